"""Optimizers, clipping, decay, LoRA+ and NEFTune against code that is not ours, or against what their papers say."""

from typing import Any

import numpy as np
import pytest
from test_engines import config, random_batch, spread

import mlx_finetune.engines.mlx  # noqa: F401  its BLAS before MLX
from mlx_finetune.engines import open_engine
from mlx_finetune.engines.noise import noise_of
from mlx_finetune.engines.optimizers import slots_of, update

RATE, DECAY, STEPS = 1e-2, 0.1, 6
BF16 = 0.02  # torch's Muon multiplies in bfloat16, 8 bits


def by_ours(rule: str, start: np.ndarray, gradients: list[np.ndarray], framework: str) -> np.ndarray:
    if framework == "torch":
        import torch

        array: Any = torch.from_numpy
    else:
        import mlx.core as mx

        array = mx.array
    parameter = array(start.copy())
    slots = {slot: array(np.zeros(shape, np.float32)) for slot, shape in slots_of(rule, start.shape).items()}
    for step, gradient in enumerate(gradients, 1):
        parameter, slots = update(rule, parameter, array(gradient), slots, step, RATE, DECAY)
    return np.array(parameter)


def by_theirs(rule: str, start: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    import torch
    from transformers.optimization import Adafactor

    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer: torch.optim.Optimizer = {
        "adamw": lambda: torch.optim.AdamW([parameter], lr=RATE, weight_decay=DECAY),
        "adafactor": lambda: Adafactor([parameter], lr=RATE, weight_decay=DECAY, scale_parameter=False, relative_step=False),
        "muon": lambda: torch.optim.Muon([parameter], lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
    }[rule]()
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    return parameter.detach().numpy()


@pytest.mark.parametrize("framework", ["mlx", "torch"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (7,)])
@pytest.mark.parametrize("rule", ["adamw", "adafactor", "muon"])
def test_six_steps_are_those_of_the_optimizer_that_has_its_name(rule: str, shape: tuple[int, ...], framework: str) -> None:
    if rule == "muon" and len(shape) == 1:
        pytest.skip("Muon is for matrices")
    random = np.random.default_rng(0)
    start, *gradients = (random.standard_normal(shape).astype(np.float32) for _ in range(1 + STEPS))
    ours, theirs = by_ours(rule, start, gradients, framework), by_theirs(rule, start, gradients)
    far = np.abs(theirs - start).max()
    assert far > RATE
    assert np.abs(ours - theirs).max() < (BF16 if rule == "muon" else 1e-5) * far


def moved(engine_name: str, model: Any, **settings: Any) -> dict[str, np.ndarray]:
    """How far each array goes in one step."""
    engine = open_engine(config(engine_name, **settings), model)
    spread(engine)
    before = engine.state()
    engine.step([random_batch(0)], 1e-3, seed=0)
    return {name: array - before[name] for name, array in engine.state().items()}


def test_with_lora_plus_b_learns_faster_by_the_ratio_and_a_as_before(engine_name: str, tiny_llama: Any) -> None:
    plain, plus = (moved(engine_name, tiny_llama, weight_decay=0.0, loraplus_lr_ratio=ratio) for ratio in (1.0, 8.0))
    for name in plain:
        if name.startswith("adapter/"):
            times = 8 if name.endswith("lora_B.weight") else 1
            np.testing.assert_allclose(plus[name], times * plain[name], rtol=1e-3, atol=1e-6)


def test_a_gradient_longer_than_allowed_is_cut_to_that_length(engine_name: str, tiny_llama: Any) -> None:
    for allowed in (0.01, 0.5):
        engine = open_engine(config(engine_name, max_grad_norm=allowed), tiny_llama)
        spread(engine)
        result = engine.step([random_batch(0)], 1e-3, seed=0)
        assert result.grad_norm > 0.5  # told as it was
        moments = np.concatenate([array.ravel() for name, array in engine.state().items() if name.startswith("m/")])
        assert np.linalg.norm(moments / 0.1) == pytest.approx(allowed, rel=1e-4)


def test_noise_on_embeddings_is_uniform_within_its_bound_and_changes_what_is_learned(engine_name: str, tiny_llama: Any) -> None:
    noise = noise_of(5.0, (3, 50, 64), seed=1, number=0)
    bound = 5 / np.sqrt(50 * 64)
    assert 0.99 * bound < np.abs(noise).max() <= bound and abs(noise.mean()) < 0.02 * bound
    assert noise.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert not np.array_equal(noise, noise_of(5.0, (3, 50, 64), seed=2, number=0))
    losses = []
    for alpha in (0.0, 5.0):
        engine = open_engine(config(engine_name, neftune_noise_alpha=alpha), tiny_llama)
        held_out = engine.loss_sum(random_batch(1))
        losses.append((engine.step([random_batch(0)], 0.0, seed=0).loss, held_out))
    assert abs(losses[0][0] - losses[1][0]) > 1e-4 and losses[0][1] == pytest.approx(losses[1][1], rel=1e-6)
