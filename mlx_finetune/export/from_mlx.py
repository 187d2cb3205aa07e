"""What an adapter of mlx-lm changes in the original weights: LoRA, DoRA or whole weights, of any architecture that mlx-lm loads.

Its names are those of mlx-lm's class. Where a parameter is a tensor of the checkpoint, or a stack or rows of them as of experts,
matrices are added and whole weights written as they are; elsewhere the change is carried back through its own `sanitize`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.export.mlx_adapter import CONFIG, TENSORS, Parts, open_in_mlx_lm, read_parts, read_settings
from mlx_finetune.export.pulled import Pulled
from mlx_finetune.export.rows import (
    BASE,
    ORIGINAL,
    Change,
    Headers,
    Rows,
    factored,
    finite,
    fitting,
    original,
    rows_at,
    trained_rows,
    with_twin,
)
from mlx_finetune.files import read_json
from mlx_finetune.models.weights import ITEM_BYTES


def is_mlx_adapter(folder: Path) -> bool:
    """Whether mlx-lm wrote the folder; one that serves peft too is peft's."""
    if not (folder / TENSORS).is_file() or not (folder / CONFIG).is_file():
        return False
    config = read_json(folder / CONFIG)
    return isinstance(config, dict) and "peft_type" not in config


def mlx_changes(model: Path, adapter: Path) -> dict[str, Change]:
    """The tensors of `model` that the adapter changes, by name.

    Raises:
        UserError: a broken adapter, one that does not fit, or a change that has no place in the checkpoint.
    """
    from mlx_finetune.engines.mlx.pullback import Sources, Unmapped

    kind, scale = read_settings(adapter / CONFIG)
    parts = read_parts(adapter / TENSORS, kind)
    headers, is_tied = original(model)
    place = _Place(model, headers)
    try:
        sources = Sources(place.make, {name: one.shape for name, one in headers.items()}, parts)
        groups = sources.groups()
    except Unmapped as error:
        packed = any(one.dtype not in ITEM_BYTES for one in headers.values())
        raise UserError(f"{adapter} on {model}: {error}", hint=ORIGINAL if packed else BASE) from error
    for parameter, own in parts.items():
        _check_shapes(parameter, own, sources.shapes[parameter], place.is_embedding(parameter))
    open_in_mlx_lm(place.make(), adapter, evaluated=False)  # what it does not open could not be verified once it is written
    changes: dict[str, Change] = {}
    for group in groups:
        for tensor, rows in _of_group(group, sources, parts, scale, place).items():
            changes[tensor] = Change(fitting(model, headers, tensor, headers[tensor].shape, f"{adapter} changes"), rows)
    return with_twin(changes, headers, is_tied)


class _Place:
    """The model as mlx-lm's class has it, without its weights, and the original's weights in that class's layout."""

    def __init__(self, model: Path, headers: Headers) -> None:
        import mlx.nn as nn

        self._folder, self._files = model, sorted({one.file for one in headers.values()})
        self._made: dict[str, Any] = {}
        modules: Any = self.make().named_modules()
        self._embeddings = {f"{name}.weight" for name, module in modules if isinstance(module, nn.Embedding)}

    def make(self) -> Any:
        """A fresh one, not evaluated."""
        from mlx_finetune.engines.mlx.load import empty_model

        return empty_model(self._folder)

    def is_embedding(self, parameter: str) -> bool:
        """Whether tokens are looked up in it; its matrices are the other way round."""
        return parameter in self._embeddings

    def weight(self, parameter: str) -> np.ndarray:
        """Of the original, float32, in the layout of mlx-lm's class, which computes in float32 too; it is not kept."""
        import mlx.core as mx

        if parameter not in self._made:
            stored: dict[str, Any] = {}
            for file in self._files:
                stored |= mx.load(str(file))  # type: ignore[arg-type]
            stored = {n: one.astype(mx.float32) if mx.issubdtype(one.dtype, mx.floating) else one for n, one in stored.items()}
            model = self.make()
            self._made = dict(model.sanitize(stored)) if hasattr(model, "sanitize") else stored
        return np.array(self._made.pop(parameter).astype(mx.float32))


def _check_shapes(parameter: str, own: Parts, shape: tuple[int, ...], on_embeddings: bool) -> None:
    """Raises UserError where a parameter of this shape does not take what the adapter has of it."""
    if "" in own:
        fits = own[""].shape == shape
    elif len(shape) == 3:  # of experts mlx-lm has A as [E r, in] or as [E, r, in]
        (experts, _, columns), a, b = shape, own["lora_a"].shape, own["lora_b"].shape
        rank = b[-1] if b else 0
        fits = "m" not in own and b == (*shape[:2], rank) and a in ((experts, rank, columns), (experts * rank, columns))
    else:
        left, right = own["lora_a"].shape, own["lora_b"].shape
        left, right = (left, right) if on_embeddings else (right[::-1], left[::-1])
        fits = len(left) == len(right) == 2 and (left[0], right[1]) == shape and left[1] == right[0]
        fits = fits and ("m" not in own or own["m"].shape == shape[:1])
    if not fits:
        has = ", ".join(f"{leaf} {list(one.shape)}".strip() for leaf, one in own.items())
        raise UserError(f"{next(iter(own.values())).file}: {parameter} {list(shape)} does not take {has}", hint=BASE)


def _of_group(
    group: Sequence[str], sources: Any, parts: Mapping[str, Parts], scale: float, place: _Place
) -> dict[str, Callable[[], Rows]]:
    """What becomes of the rows of each tensor that the parameters of a group are made of."""
    parameter = group[0]
    own, shape, tensors = parts[parameter], sources.shapes[parameter], sources.of[parameter]
    if all(one in sources.slices for one in group):
        slices = [(one, parts[one], sources.shapes[one], sources.slices[one]) for one in group]
        return {tensors[0]: partial(_slices_rows, slices, scale)}
    if len(group) == 1 and parameter in sources.same and ("" in own or len(shape) == 2):
        if "" in own:
            return {tensors[0]: partial(trained_rows, parameter, own[""])}
        return {tensors[0]: partial(_factored_rows, parameter, own, scale, place.is_embedding(parameter))}
    if len(group) == 1 and parameter in sources.stacks:
        return {tensor: partial(_expert_rows, parameter, own, scale, number, shape) for number, tensor in enumerate(tensors)}
    changes = {one: partial(_change, one, parts[one], sources.shapes[one], scale, place) for one in group}
    pulled = Pulled(group, sources, lambda one: changes[one](), hint="leave that module out")
    return {tensor: partial(_pulled_rows, pulled, tensor) for tensor in pulled.tensors}


def _factored_rows(parameter: str, own: Parts, scale: float, on_embeddings: bool) -> Rows:
    left, right = _factors(parameter, own, scale, on_embeddings)
    return factored(left, right, finite(own["m"], parameter) if "m" in own else None)


def _expert_rows(parameter: str, own: Parts, scale: float, number: int, shape: tuple[int, ...]) -> Rows:
    if "" in own:
        one = rows_at(own[""], number, 1)
        return trained_rows(parameter, replace(one, shape=shape[1:]))
    return factored(*_expert_factors(parameter, own, scale, number, shape), None)


def _slices_rows(slices: Sequence[tuple[str, Parts, tuple[int, ...], int]], scale: float) -> Rows:
    """Of one tensor [E, rows, in] for all experts, of which a row is an expert, and in which parameters stand from a row on."""

    def rows(first: int, before: np.ndarray) -> np.ndarray:
        after = before.copy()
        for parameter, own, shape, row in slices:
            for number, flat in enumerate(after):
                here = flat.reshape(-1, shape[2])[row : row + shape[1]]
                if "" in own:
                    here[:] = finite(rows_at(own[""], first + number, 1), parameter)[0]
                else:
                    left, right = _expert_factors(parameter, own, scale, first + number, shape)
                    here += left @ right
        return after

    return rows


def _expert_factors(parameter: str, own: Parts, scale: float, number: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """scale * B [out, r] and A [r, in] of one expert; nothing else is read."""
    of_one = own["lora_a"].shape[0] // shape[0]
    a = finite(rows_at(own["lora_a"], number * of_one, of_one), parameter).reshape(-1, shape[2])
    return np.float32(scale) * finite(rows_at(own["lora_b"], number, 1), parameter)[0], a


def _factors(parameter: str, own: Parts, scale: float, on_embeddings: bool) -> tuple[np.ndarray, np.ndarray]:
    """scale * B [rows, r] and A [r, columns] of the parameter."""
    a, b = finite(own["lora_a"], parameter), finite(own["lora_b"], parameter)
    left, right = (a, b) if on_embeddings else (np.ascontiguousarray(b.T), np.ascontiguousarray(a.T))
    return np.float32(scale) * left, right


def _pulled_rows(pulled: Pulled, tensor: str) -> Rows:
    flat = pulled.take(tensor)
    return lambda first, before: before + flat[first : first + len(before)].reshape(before.shape)


def _change(parameter: str, own: Parts, shape: tuple[int, ...], scale: float, place: _Place) -> np.ndarray:
    """Of the parameter, float32, in its own shape."""
    if "" in own:
        whole: np.ndarray = finite(own[""], parameter) - place.weight(parameter)
        return whole
    if len(shape) == 3:
        factors = (_expert_factors(parameter, own, scale, number, shape) for number in range(shape[0]))
        return np.stack([left @ right for left, right in factors])
    left, right = _factors(parameter, own, scale, place.is_embedding(parameter))
    if "m" not in own:
        product: np.ndarray = left @ right
        return product
    before = place.weight(parameter)
    change: np.ndarray = factored(left, right, finite(own["m"], parameter))(0, before) - before
    return change
