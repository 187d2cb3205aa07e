"""Hidden states of frozen layers are computed once; what is learned from them is what is learned without."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from short_runs import prepared, run, settings
from test_steps import batches, check_alike, family, first_step
from tiny_models import make_tiny

from mlx_finetune.config import make_config
from mlx_finetune.engines import TRUNK, open_engine
from mlx_finetune.engines.mlx.trunk import Trunk
from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.compare import compare

LAST = {"num_layers": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    names = ("llama", "gemma2", "gemma3_text", "cohere2")
    return {name: make_tiny(name, folder / name, tokenizer=False) for name in names}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens the layers below have computed, call by call."""
    calls: list[int] = []
    own = Trunk._compute

    def counting(self: Trunk, model: Any, inputs: Any, layouts: Any) -> Any:
        calls.append(inputs.size)
        return own(self, model, inputs, layouts)

    monkeypatch.setattr(Trunk, "_compute", counting)
    return calls


def states_after(model: Path, steps: int, **settings: Any) -> dict[str, np.ndarray]:
    engine = open_engine(make_config({"engine": "mlx", "dtype": "float32", "rank": 4} | LAST | settings, "test"), model)
    for step in range(steps):
        engine.step(batches(family(), 3 + step % 2), 1e-2, seed=step)
    return engine.state()


@pytest.mark.parametrize(
    ("model_type", "ways"),
    [
        ("llama", {"share_prefixes": "never"}),
        ("llama", {"grad_checkpoint": 1}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("cohere2", {}),
    ],
)
def test_what_is_learned_is_the_same_and_the_layers_below_are_computed_once(
    model_type: str, ways: dict[str, Any], models: dict[str, Path], tmp_path: Path, computed: list[int]
) -> None:
    kept = {"cache_trunk": True, "out": str(tmp_path / "run")}
    for _ in range(2):  # computed, then read
        check_alike(*(first_step(models[model_type], batches(family()), **LAST, **ways, **more) for more in ({}, kept)))
    once = len(computed)
    assert once >= 1
    plain, with_trunk = (states_after(models[model_type], 2, **ways, **more) for more in ({}, kept))
    assert len(computed) == once  # other micro-batches of the same rows
    for name, array in plain.items():
        assert np.abs(array - with_trunk[name]).max() <= 1e-4 * max(np.abs(array).max(), 1e-3), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_states_are_kept_bit_by_bit(dtype: str, models: dict[str, Path], tmp_path: Path) -> None:
    same = {"dtype": dtype, "share_prefixes": "never", "cache_trunk": True, "out": str(tmp_path / "run")}
    first, second = (first_step(models["llama"], batches(family()), **LAST | same) for _ in range(2))
    assert first[0] == second[0]
    for name, gradient in first[1].items():
        assert np.array_equal(gradient, second[1][name])


def test_what_a_crash_left_is_mended_and_what_was_kept_for_another_model_is_not_used(
    models: dict[str, Path], tmp_path: Path, computed: list[int]
) -> None:
    kept = {"cache_trunk": True, "out": str(tmp_path / "run"), "share_prefixes": "never"} | LAST
    plain = first_step(models["llama"], batches(family()), **LAST)
    check_alike(plain, first_step(models["llama"], batches(family()), **kept))
    whole, folder = len(computed), tmp_path / "run" / TRUNK
    index, data = folder / "index.jsonl", folder / "states.bin"
    index.write_text(index.read_text()[:-9])
    data.write_bytes(data.read_bytes()[:-1000])
    check_alike(plain, first_step(models["llama"], batches(family()), **kept))
    assert whole < len(computed) <= 2 * whole
    before = len(computed)
    content = bytearray(data.read_bytes())
    content[2000:6096] = bytes(4096)  # as a power cut leaves a page that never came to the disk
    data.write_bytes(content)
    check_alike(plain, first_step(models["llama"], batches(family()), **kept))
    assert len(computed) > before
    before = len(computed)
    check_alike(plain, first_step(models["llama"], batches(family()), **kept))
    assert len(computed) == before
    other = make_tiny("llama", tmp_path / "other", tokenizer=False, seed=9)
    before = len(computed)
    check_alike(first_step(other, batches(family()), **LAST), first_step(other, batches(family()), **kept))
    assert len(computed) == before + whole


def test_it_is_refused_by_name_where_nothing_can_be_kept_or_torch_computes(models: dict[str, Path], tmp_path: Path) -> None:
    kept = {"cache_trunk": True, "out": str(tmp_path / "run")}
    with pytest.raises(UserError, match="every layer learns"):
        first_step(models["llama"], batches(family()), **kept)
    with pytest.raises(UserError, match="cache_trunk = true is not there with the torch engine"):
        first_step(models["llama"], batches(family()), **LAST, **kept, engine="torch")
    assert not (tmp_path / "run").exists()


def test_no_room_on_the_disk_is_said_before_anything_is_computed(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_finetune.training.run import trunk_bytes

    config = make_config({"cache_trunk": True, "out": str(tmp_path / "run"), "dtype": "bfloat16"}, "test")
    dataset = SimpleNamespace(train=SimpleNamespace(lengths=(1001, 501)), valid=SimpleNamespace(lengths=(101,)))
    plan: Any = SimpleNamespace(config=config, model=models["llama"], run=tmp_path / "run", dataset=dataset)
    assert trunk_bytes(plan) == 1600 * 64 * 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"cache_trunk needs 0\.0 GB"):
        trunk_bytes(plan)


def test_the_held_out_loss_too_computes_the_layers_below_once(models: dict[str, Path], tmp_path: Path, computed: list[int]) -> None:
    values = {"engine": "mlx", "dtype": "float32", "rank": 4, "out": str(tmp_path)} | LAST
    with_, without = (open_engine(make_config(values | {"cache_trunk": kept}, "test"), models["llama"]) for kept in (True, False))
    held_out = batches(family(), 3)
    losses = [[engine.loss_sum(batch) for batch in held_out] for engine in (with_, with_, without)]
    assert losses[0] == losses[1] and len(computed) == len(held_out)
    assert np.allclose(losses[0], losses[2], rtol=1e-6)


def test_evaluating_leaves_no_hidden_states_behind(tiny_llama: Path, tmp_path: Path) -> None:
    data = prepared(tiny_llama, tmp_path, "ls")
    values = settings(tiny_llama, data, tmp_path / "run", "mlx", num_layers=2, cache_trunk=True, steps=2)
    made = run(values)
    compare(made, "latest")
    assert not (made / "trunk").exists()
