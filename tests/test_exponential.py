"""`power`, used on a Linux CPU, raises as `mx.exp` does, and so is what is made of it; the paths of a GPU are tried here too."""

import numpy as np
import pytest
from test_steps import PLAIN, WAYS, batches, check_alike, family, first_step, models  # noqa: F401  a fixture

import mlx_finetune.engines.mlx  # noqa: F401  its BLAS before MLX
from mlx_finetune.engines.mlx import attention, exponential, loss

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")
RANDOM = np.random.default_rng(0)
SLOW = ("mlx_finetune.engines.mlx.exponential.exp_is_slow", "mlx_finetune.engines.mlx.attention.exp_is_slow")


def numbers(*shape: int, spread: float = 4.0) -> np.ndarray:
    return (spread * RANDOM.standard_normal(shape)).astype(np.float32)


@pytest.fixture(params=["power", "exp"])
def raised_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in SLOW:
        monkeypatch.setattr(name, lambda dtype: request.param == "power")
    return str(request.param)


def test_e_to_the_x_is_right_to_float32(raised_by: str) -> None:
    x = np.linspace(-20, 20, 100_001).astype(np.float32)
    found = np.array(exponential.exp(mx.array(x)), np.float64)
    assert np.abs(found / np.exp(x.astype(np.float64)) - 1).max() < 3e-6
    assert float(exponential.exp(mx.array(-float("inf"))).item()) == 0


def test_probabilities_sum_to_one_and_are_those_of_float64(raised_by: str) -> None:
    x = numbers(30, 700)
    x[0, 5:] = np.finfo(np.float32).min  # what a mask leaves
    found = np.array(exponential.softmax(mx.array(x)), np.float64)
    right = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    right /= right.sum(-1, keepdims=True)
    assert np.abs(found - right).max() < 2e-6 and np.abs(found.sum(-1) - 1).max() < 2e-6


def test_a_gated_layer_and_its_gradient_are_those_of_silu(raised_by: str) -> None:
    gate, x = mx.array(numbers(40, 50)), mx.array(numbers(40, 50))
    gate[0, :4] = mx.array([-100.0, 100.0, 0.0, -30.0])
    into = mx.array(numbers(40, 50))
    ours, plain = (
        mx.grad(lambda both, f=f: (f(*both) * into).sum())((gate, x)) for f in (exponential.swiglu, lambda g, x: nn.silu(g) * x)
    )
    assert mx.allclose(exponential.swiglu(gate, x), nn.silu(gate) * x, rtol=1e-5, atol=1e-6)
    assert all(mx.allclose(one, other, rtol=1e-5, atol=1e-5) for one, other in zip(ours, plain, strict=True))


@pytest.mark.parametrize("vocabulary", [50, 1000, 49_152])
def test_the_loss_and_its_gradient_are_those_of_float64(vocabulary: int, raised_by: str) -> None:
    # 16 wide: MKL multiplies what is 8 wide by another way, on an AMD off by 4e-5 over 49,152 terms; no model is that narrow
    hidden, head = numbers(70, 16, spread=0.7), numbers(vocabulary, 16, spread=1.0)
    targets, weights = RANDOM.integers(0, vocabulary, 70), RANDOM.uniform(0.1, 2, 70)
    given = mx.array(targets.astype(np.int32)), mx.array(weights.astype(np.float32))
    value, gradient = mx.value_and_grad(lambda h: loss.loss_sum(lambda x: x @ mx.array(head).T, h, *given))(mx.array(hidden))
    logits = hidden.astype(np.float64) @ head.T.astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    total = p.sum(-1, keepdims=True)
    right = ((np.log(total[:, 0]) + logits.max(-1) - logits[np.arange(70), targets]) * weights).sum()
    p /= total
    p[np.arange(70), targets] -= 1
    assert abs(float(value.item()) / right - 1) < 1e-6
    expected = (p * weights[:, None]) @ head
    assert np.abs(np.array(gradient) - expected).max() < 1e-5 * np.abs(expected).max()
    again = loss.losses_of(lambda x: x @ mx.array(head).T, mx.array(hidden), given[0])
    assert abs(again.astype(np.float64) @ weights / right - 1) < 1e-6


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_step_is_the_same_however_exponentials_are_computed(
    model_type: str,
    models: dict[str, object],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a Mac: fused attention forward in each block, MLX's own softmax and SiLU."""
    folder, given = models[model_type], batches(family(), 8)
    here = [first_step(folder, given, **settings) for settings in (PLAIN, WAYS["trees"])]  # type: ignore[arg-type]
    for name in SLOW:
        monkeypatch.setattr(name, lambda dtype: False)
    for one, settings in zip(here, (PLAIN, WAYS["trees"]), strict=True):
        check_alike(one, first_step(folder, given, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [None, 90])
def test_blocks_are_cut_so_that_few_scores_exist_at_once(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORES", 4 * 16 * 100)
    monkeypatch.setattr(attention, "FEWEST", 16)
    blocks = attention.Layout.rows(300).make_mask(300, window_size=window).blocks
    pieces = [piece for block in blocks for piece in block.pieces(4)]
    assert [piece.start for piece in pieces][1:] == [piece.end for piece in pieces][:-1]
    keys = [sum(high - low for low, high in piece.ranges) for piece in pieces]
    assert all(4 * (p.end - p.start) * k <= max(4 * 16 * 100, 4 * 16 * k) for p, k in zip(pieces, keys, strict=True))
    q, k, v = (mx.array(numbers(2, heads, 300, 8, spread=1.0)) for heads in (4, 2, 2))
    distance = np.subtract.outer(np.arange(300), np.arange(300))
    mask = mx.array((distance >= 0) & (distance < (window or 300)))
    right = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
    assert mx.allclose(attention.flash_attention(q, k, v, 0.3, blocks), right, rtol=1e-5, atol=1e-5)
