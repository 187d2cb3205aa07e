"""Which tensors of a checkpoint a parameter of mlx-lm is made of, and in which order."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import make_joined

from mlx_finetune.engines.mlx.pullback import Sources, Unmapped, _markers
from mlx_finetune.models.weights import tensor_headers

EXPERTS, ROWS, COLUMNS, LAYERS = 3, 32, 24, 2
GATE, UP = "layers.{}.gate.weight", "layers.{}.up.weight"
APART = {f"layers.{n}.experts.{e}.gate.weight": (ROWS, COLUMNS) for n in range(LAYERS) for e in range(EXPERTS)}
JOINED: dict[str, tuple[int, ...]] = {f"layers.{n}.gate_up": (EXPERTS, 2 * ROWS, COLUMNS) for n in range(LAYERS)}


class Reading:
    """A model that is nothing but how it reads weights."""

    def __init__(self, sanitize: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.sanitize = sanitize


def sources(sanitize: Callable[[dict[str, Any]], dict[str, Any]], shapes: dict[str, tuple[int, ...]], *names: str) -> Sources:
    make: Any = lambda: Reading(sanitize)  # noqa: E731
    return Sources(make, shapes, [name.format(n) for n in range(LAYERS) for name in names])


def stacked(turn: Callable[[int, Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    import mlx.core as mx

    return lambda weights: {
        GATE.format(n): mx.stack([turn(e, weights[f"layers.{n}.experts.{e}.gate.weight"]) for e in range(EXPERTS)])
        for n in range(LAYERS)
    }


def halved(weights: dict[str, Any]) -> dict[str, Any]:
    both = {n: weights[f"layers.{n}.gate_up"] for n in range(LAYERS)}
    halves = {n: (array[:, : array.shape[1] // 2], array[:, array.shape[1] // 2 :]) for n, array in both.items()}
    return {GATE.format(n): half[0] for n, half in halves.items()} | {UP.format(n): half[1] for n, half in halves.items()}


def cut(weights: dict[str, Any]) -> dict[str, Any]:
    """As `halved`, by a number that the class has."""
    both = {n: weights[f"layers.{n}.gate_up"] for n in range(LAYERS)}
    return {GATE.format(n): one[:, :ROWS] for n, one in both.items()} | {UP.format(n): one[:, ROWS:] for n, one in both.items()}


def test_markers_stay_what_they_are_when_a_class_adds_one_and_takes_it_away() -> None:
    markers = _markers(20_000)
    assert markers.dtype == np.float32 and len(set(markers.tolist())) == 20_000
    assert np.array_equal((markers + np.float32(1)) - np.float32(1), markers)
    assert not set(markers.tolist()) & set((markers + np.float32(1)).tolist())


def test_experts_one_after_the_other_are_a_stack_in_their_order() -> None:
    found = sources(stacked(lambda e, array: array), APART, GATE)
    assert found.stacks == {GATE.format(n) for n in range(LAYERS)}
    assert found.of[GATE.format(1)] == tuple(f"layers.1.experts.{e}.gate.weight" for e in range(EXPERTS))
    backwards = sources(
        lambda weights: {name: array[::-1] for name, array in stacked(lambda e, array: array)(weights).items()}, APART, GATE
    )
    assert backwards.of[GATE.format(0)] == tuple(f"layers.0.experts.{e}.gate.weight" for e in reversed(range(EXPERTS)))


@pytest.mark.parametrize(
    "turn",
    [
        lambda e, array: array[::-1],
        lambda e, array: array[:, ::-1] if e == EXPERTS - 1 else array,  # the first expert alone does not tell
        lambda e, array: array.reshape(array.shape[::-1]).T,
        lambda e, array: array[::-1] if array.shape == (ROWS, COLUMNS) else array,  # nor do small ones
    ],
)
def test_experts_whose_numbers_move_are_no_stack(turn: Callable[[int, Any], Any]) -> None:
    found = sources(stacked(turn), APART, GATE)
    assert not found.stacks and set(found.of[GATE.format(0)]) == {f"layers.0.experts.{e}.gate.weight" for e in range(EXPERTS)}


def test_biases_of_experts_are_a_stack_too() -> None:
    biases: dict[str, tuple[int, ...]] = {name: (ROWS,) for name in APART}
    assert sources(stacked(lambda e, array: array), biases, GATE).stacks == {GATE.format(n) for n in range(LAYERS)}
    assert not sources(stacked(lambda e, array: array[::-1]), biases, GATE).stacks


@pytest.mark.parametrize("sanitize", [halved, cut])
def test_halves_of_a_tensor_of_all_experts_are_slices_of_it(sanitize: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    found = sources(sanitize, JOINED, GATE, UP)
    assert found.slices == {name.format(n): row for n in range(LAYERS) for name, row in ((GATE, 0), (UP, ROWS))}
    assert found.groups() == [[GATE.format(n), UP.format(n)] for n in range(LAYERS)]


@pytest.mark.parametrize(
    "moved", [lambda array: array[:, ::2], lambda array: array[::-1, :ROWS], lambda array: array[:, :ROWS, ::-1]]
)
def test_other_parts_of_a_tensor_are_no_slices_of_it(moved: Callable[[Any], Any]) -> None:
    found = sources(lambda weights: {GATE.format(n): moved(weights[f"layers.{n}.gate_up"]) for n in range(LAYERS)}, JOINED, GATE)
    assert not found.slices and found.of[GATE.format(0)] == ("layers.0.gate_up",)


def test_a_class_that_is_told_the_sizes_is_shown_tensors_of_these() -> None:
    found = sources(stacked(lambda e, array: array.reshape(4, ROWS // 4, COLUMNS).reshape(ROWS, COLUMNS)), APART, GATE)
    assert found.stacks == {GATE.format(n) for n in range(LAYERS)}


def test_a_tensor_that_a_class_misses_and_packed_numbers_are_told() -> None:
    import mlx.core as mx

    fewer = {name: shape for name, shape in APART.items() if ".1.experts.2" not in name}
    with pytest.raises(Unmapped, match=r"layers\.1\.experts\.2\.gate\.weight, of which"):
        sources(stacked(lambda e, array: array), fewer, GATE)
    packed = stacked(lambda e, array: array)
    with pytest.raises(Unmapped, match="packed numbers"):
        sources(lambda weights: {name: array.view(mx.uint32) for name, array in packed(weights).items()}, APART, GATE)


@pytest.mark.parametrize("model_type", ["granitemoe", "qwen3_5_moe_text"])
def test_experts_that_architectures_join_are_found_where_they_stand(model_type: str, tmp_path: Path) -> None:
    from mlx.utils import tree_flatten

    from mlx_finetune.engines.mlx.load import empty_model

    model = make_joined(model_type, tmp_path / "model", {})
    shapes = {name: location.shape for name, location in tensor_headers(model).items()}
    wanted = [name for name, _ in tree_flatten(empty_model(model).parameters()) if ".switch_mlp." in name]
    found = Sources(lambda: empty_model(model), shapes, wanted)
    assert len(wanted) == 12 and found.slices.keys() == set(wanted)
    assert {row for name, row in found.slices.items() if "up_proj" in name} != {0}
