"""Experts of a mixture are adapted alike on both engines, as peft reads it, and only where they are asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_engines import config, random_batch, spread
from test_parity import ADAPTER, FALLING, LOSS, NORM
from tiny_models import make_tiny

from mlx_finetune.engines import Engine, open_engine
from mlx_finetune.training.schedule import learning_rate

MIXTURES = ("qwen3_moe", "mixtral", "olmoe")
BOTH = {"target_modules": "all-linear,experts"}
STEPS = 5


def steps(engine: str, model: Path, settings: dict[str, Any]) -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    how = config(engine, **FALLING | BOTH | settings)
    opened = open_engine(how, model)
    spread(opened, scale=0.05)
    results = [opened.step([random_batch(i)], learning_rate(i, STEPS, how), seed=i) for i in range(STEPS)]
    return [r.loss for r in results], [r.grad_norm for r in results], opened.state()


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_are_trained_alike_on_either_engine(model_type: str, tmp_path: Path) -> None:
    model = make_tiny(model_type, tmp_path / "model", tokenizer=False)
    (loss, norm, state), (loss_, norm_, state_) = (steps(engine, model, {}) for engine in ("mlx", "torch"))
    np.testing.assert_allclose(loss, loss_, atol=LOSS)
    np.testing.assert_allclose(norm, norm_, rtol=NORM)
    assert state.keys() == state_.keys() and "adapter/model.layers.0.mlp.experts.up_proj.lora_B.weight" in state
    for name, array in state.items():
        if name.startswith("adapter/"):
            np.testing.assert_allclose(array, state_[name], atol=ADAPTER, err_msg=name)
