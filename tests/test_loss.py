"""The loss and its gradient against their definition in float64, whatever is computed together."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from tiny_models import SIZES

import mlx_finetune.engines.mlx  # noqa: F401  before MLX is imported: its fast BLAS
from mlx_finetune.config import RunConfig
from mlx_finetune.files import write_json

WIDTH, VOCABULARY = 8, 300
Loss = tuple[float, np.ndarray, np.ndarray]  # and its gradient by the hidden states and by the head


def case(rows: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states, head, targets, weights: some of these 0 and some no whole number."""
    random = np.random.default_rng(rows)
    hidden, head = random.normal(0, scale, (rows, WIDTH)), random.normal(0, 1, (VOCABULARY, WIDTH))
    weights = random.choice([0.0, 0.5, 1.0, 2.0], rows)
    return hidden.astype(np.float32), head.astype(np.float32), random.integers(0, VOCABULARY, rows), weights.astype(np.float32)


def by_definition(hidden: np.ndarray, head: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, Loss]:
    """Each cross entropy; the sum of weight times it, and the gradients: (softmax - one hot) times the weight."""
    hidden, head = hidden.astype(np.float64), head.astype(np.float64)
    logits = hidden @ head.T
    raised = np.exp(logits - logits.max(1, keepdims=True))
    each = np.log(raised.sum(1)) + logits.max(1) - logits[np.arange(len(targets)), targets]
    by_logits = raised / raised.sum(1, keepdims=True)
    by_logits[np.arange(len(targets)), targets] -= 1
    by_logits *= weights[:, None]
    return each, (float(each @ weights), by_logits @ head, by_logits.T @ hidden)


def in_mlx(hidden: np.ndarray, head: np.ndarray, targets: np.ndarray, weights: np.ndarray, times: float) -> Loss:
    import mlx.core as mx

    from mlx_finetune.engines.mlx.loss import loss_sum

    def loss(hidden: mx.array, head: mx.array) -> mx.array:
        apply = lambda x, learned=None: x @ (learned["w"] if learned else head).T  # noqa: E731
        return times * loss_sum(apply, hidden, mx.array(targets), mx.array(weights), {"w": head})

    value, (one, other) = mx.value_and_grad(loss, (0, 1))(mx.array(hidden), mx.array(head))
    return float(np.array(value)), np.array(one), np.array(other)


def in_torch(hidden: np.ndarray, head: np.ndarray, targets: np.ndarray, weights: np.ndarray, times: float) -> Loss:
    import torch

    from mlx_finetune.engines.torch.loss import loss_sum

    one, other = (torch.tensor(each, requires_grad=True) for each in (hidden, head))
    value = times * loss_sum(lambda x: x @ other.T, VOCABULARY, one, torch.tensor(targets), torch.tensor(weights), [other])
    value.backward()
    assert one.grad is not None and other.grad is not None
    return value.item(), one.grad.numpy(), other.grad.numpy()


ENGINES: dict[str, Callable[..., Loss]] = {"mlx": in_mlx, "torch": in_torch}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows together, at the most."""
    for name, value in (("FEWEST", 1), ("LOGITS", 7 * VOCABULARY + 1)):
        monkeypatch.setattr(f"mlx_finetune.engines.mlx.loss.{name}", value)
    monkeypatch.setattr("mlx_finetune.engines.torch.loss.FEWEST", 1)
    monkeypatch.setattr("mlx_finetune.engines.torch.loss.LOGITS", {"cpu": 7 * VOCABULARY + 1})


@pytest.mark.parametrize(("rows", "times"), [(1, 1.0), (7, 1.0), (8, 3.0), (20, 0.5)])
def test_the_sum_and_its_gradients_are_those_of_the_definition(
    rows: int, times: float, engine_name: str, small_chunks: None
) -> None:
    given = case(rows)
    _, (value, by_hidden, by_head) = by_definition(*given)
    found = ENGINES[engine_name](*given, times)
    assert found[0] == pytest.approx(times * value, rel=1e-5)
    np.testing.assert_allclose(found[1], times * by_hidden, atol=2e-5)
    np.testing.assert_allclose(found[2], times * by_head, atol=2e-5)


def test_logits_in_the_hundreds_neither_overflow_nor_lose_the_loss(engine_name: str) -> None:
    given = case(40, scale=100.0)
    each, (value, by_hidden, _) = by_definition(*given)
    found = ENGINES[engine_name](*given, 1.0)
    assert each.max() > 500 and found[0] == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(found[1], by_hidden, atol=1e-3)


def test_each_loss_alone_is_that_of_the_definition(engine_name: str, small_chunks: None) -> None:
    hidden, head, targets, weights = case(20)
    each, _ = by_definition(hidden, head, targets, weights)
    if engine_name == "mlx":
        import mlx.core as mx

        from mlx_finetune.engines.mlx import loss

        found: Any = loss.losses_of(lambda x: x @ mx.array(head).T, mx.array(hidden), mx.array(targets))
    else:
        import torch

        from mlx_finetune.engines.torch import loss as torch_loss

        arrays = torch.tensor(hidden), torch.tensor(targets)
        found = torch_loss.losses_of(lambda x: x @ torch.tensor(head).T, VOCABULARY, *arrays).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, each, atol=1e-5)


@pytest.mark.parametrize(("vocabulary", "together"), [(300, 7), (700, 3), (1050, 2), (2101, 1), (10**6, 1)])
def test_no_more_logits_are_there_at_once_than_is_said(
    vocabulary: int, together: int, engine_name: str, small_chunks: None
) -> None:
    sizes: list[int] = []
    if engine_name == "mlx":
        import mlx.core as mx

        from mlx_finetune.engines.mlx.loss import _chunks

        found = _chunks(lambda x: mx.zeros((x.shape[0], vocabulary)), mx.zeros((20, WIDTH)))
        assert found[0][0] == 0 and found[-1][1] == 20 and all(one[1] == two[0] for one, two in pairwise(found))
        sizes = [end - start for start, end in found]
    else:
        import torch

        from mlx_finetune.engines.torch.loss import _chunks as torch_chunks

        sizes = [len(part) for (part,) in torch_chunks(vocabulary, torch.zeros(20, WIDTH))]
    assert sum(sizes) == 20 and max(sizes) == together and sizes[:-1] == [together] * (len(sizes) - 1)


@pytest.mark.parametrize("vocabulary", [300, 16_000, 49_152, 262_144])
def test_the_estimate_of_memory_has_as_many_logits_at_once_as_the_loss(vocabulary: int, tmp_path: Path) -> None:
    import mlx.core as mx

    from mlx_finetune.engines.mlx.loss import _chunks
    from mlx_finetune.planning.memory import head_rows
    from mlx_finetune.planning.model_shape import model_shape

    settings = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary}
    write_json(tmp_path / "config.json", settings)
    start, end = _chunks(lambda x: mx.zeros((x.shape[0], vocabulary)), mx.zeros((1000, WIDTH)))[0]
    assert end - start == head_rows(model_shape(str(tmp_path / "config.json")))


def test_logits_take_some_megabytes_on_each_device_that_may_be_chosen() -> None:
    from mlx_finetune.engines.torch.loss import LOGITS

    assert LOGITS.keys() == set(get_args(RunConfig.model_fields["device"].annotation)) - {"auto"}
    assert all(2**24 <= 4 * numbers <= 2**30 for numbers in LOGITS.values())


def test_a_head_in_half_precision_gives_a_loss_in_float32(engine_name: str) -> None:
    hidden, head, targets, weights = case(40)
    _, (value, by_hidden, _) = by_definition(hidden, head, targets, weights)
    if engine_name == "mlx":
        import mlx.core as mx

        from mlx_finetune.engines.mlx.loss import loss_sum

        half = mx.array(head).astype(mx.bfloat16)
        apply = lambda x: x @ half.T  # noqa: E731
        arrays = mx.array(hidden).astype(mx.bfloat16), mx.array(targets), mx.array(weights)
        found: Any = loss_sum(apply, *arrays)
        assert found.dtype == mx.float32
        gradient: Any = np.array(mx.grad(lambda x: loss_sum(apply, x, *arrays[1:]))(arrays[0]).astype(mx.float32))
    else:
        import torch

        from mlx_finetune.engines.torch.loss import loss_sum as torch_sum

        half_ = torch.tensor(head).bfloat16()
        states = torch.tensor(hidden).bfloat16().requires_grad_()
        found = torch_sum(lambda x: x @ half_.T, VOCABULARY, states, torch.tensor(targets), torch.tensor(weights), [])
        assert found.dtype == torch.float32
        found.backward()
        assert states.grad is not None
        gradient = states.grad.float().numpy()
    assert found.item() == pytest.approx(value, rel=0.02)
    np.testing.assert_allclose(gradient, by_hidden, atol=0.1)
