"""The base as it was trained on: its packed weights, unpacked, in the layout of the original checkpoint.

A model trained on packed weights is exactly itself only with them. What packing lost is then in the fused model too.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.export.changes import read_changes
from mlx_finetune.export.pulled import Pulled
from mlx_finetune.export.rows import Change, Rows, original, rows_at, with_twin
from mlx_finetune.files import read_json
from mlx_finetune.models.weights import ITEM_BYTES, read_float32, tensor_headers

BASE = "give the model that it was converted from"


def changes_from_packed(model: Path, packed: Path, checkpoint: Path) -> dict[str, Change]:
    """What becomes of the tensors of `model`: the numbers of `packed`, and on them what the checkpoint trained.

    Raises:
        UserError: `packed` is not made of `model`, or as `read_changes`.
    """
    base = unpacked(model, packed)
    trained = read_changes(model, checkpoint)
    both = {name: Change(one.location, partial(_one_after_other, base.get(name), one)) for name, one in trained.items()}
    return dict(sorted((base | both).items(), key=lambda item: (item[1].location.file.name, item[1].location.start)))


def _one_after_other(first: Change | None, then: Change) -> Rows:
    rows, after = first.open_rows() if first else (lambda start, before: before), then.open_rows()
    return lambda start, before: after(start, rows(start, before))


def unpacked(model: Path, packed: Path) -> dict[str, Change]:
    """What becomes of the tensors of `model` where `packed` was quantised from it; raises as `changes_from_packed`."""
    from mlx_finetune.engines.mlx.load import empty_model
    from mlx_finetune.engines.mlx.pullback import Sources, Unmapped

    headers, is_tied = original(model)
    base = _PackedBase(packed)
    try:
        sources = Sources(lambda: empty_model(model), {name: one.shape for name, one in headers.items()}, base.parameters)
        groups = sources.groups()
    except Unmapped as error:
        raise UserError(f"{packed}: {error} in {model}", hint=BASE) from error
    changes: dict[str, Change] = {}
    for group in groups:
        for tensor, rows in _of_group(group, sources, base).items():
            changes[tensor] = Change(headers[tensor], rows)
    return with_twin(changes, headers, is_tied)


class _PackedBase:
    """The packed weights of a folder; of a stack of experts one is read at a time."""

    def __init__(self, packed: Path) -> None:
        self._headers = tensor_headers(packed)
        self._settings: Mapping[str, Any] = read_json(packed / "config.json")["quantization"]
        self.parameters = [name.removesuffix(".scales") + ".weight" for name in self._headers if name.endswith(".scales")]

    def read(self, parameter: str, expert: int | None = None) -> np.ndarray:
        """The unpacked numbers of a parameter, or of one expert of it; float32."""
        import mlx.core as mx

        module = parameter.removesuffix(".weight")
        own = self._settings.get(module)
        how = own if isinstance(own, Mapping) else self._settings
        weight, scales, biases = (self._array(f"{module}.{part}", expert) for part in ("weight", "scales", "biases"))
        unpacked = mx.dequantize(
            weight, scales, biases,
            group_size=how["group_size"], bits=how["bits"], mode=how.get("mode", "affine"), dtype=mx.float32,
        )  # fmt: skip
        return np.array(unpacked if expert is None else unpacked[0])

    def _array(self, name: str, expert: int | None) -> Any:
        """A stored tensor, or that of one expert [1, ...]; None where there is none."""
        import mlx.core as mx

        location = self._headers.get(name)
        if location is None:
            return None
        if expert is not None:
            location = rows_at(location, expert, 1)
        if location.dtype in ITEM_BYTES:
            kinds = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
            return mx.array(read_float32(location)).astype(kinds[location.dtype])
        with location.file.open("rb") as file:
            file.seek(location.start)
            data = file.read(location.end - location.start)
        return mx.array(np.frombuffer(data, {"U32": "<u4", "U8": "u1"}[location.dtype]).reshape(location.shape))


def _of_group(group: list[str], sources: Any, base: _PackedBase) -> dict[str, Callable[[], Rows]]:
    tensors = sources.of[group[0]]
    if all(one in sources.slices for one in group):
        return {tensors[0]: partial(_slices_rows, [(one, sources.shapes[one], sources.slices[one]) for one in group], base)}
    if len(group) == 1 and group[0] in sources.same:
        return {tensors[0]: partial(_instead, group[0], None, base)}
    if len(group) == 1 and group[0] in sources.stacks:
        return {tensor: partial(_instead, group[0], number, base) for number, tensor in enumerate(tensors)}
    pulled = Pulled(group, sources, base.read, hint=BASE)
    return {tensor: partial(_pulled_rows, pulled, tensor) for tensor in pulled.tensors}


def _instead(parameter: str, expert: int | None, base: _PackedBase) -> Rows:
    """Rows of the parameter, or of one expert of it, whatever stood there."""
    matrix = base.read(parameter, expert)
    flat = matrix.reshape(len(matrix), -1)
    return lambda first, before: flat[first : first + len(before)]


def _slices_rows(slices: list[tuple[str, tuple[int, ...], int]], base: _PackedBase) -> Rows:
    """Of one tensor [E, rows, in] for all experts, of which a row is an expert, and in which parameters stand from a row on."""

    def rows(first: int, before: np.ndarray) -> np.ndarray:
        after = before.copy()
        for parameter, shape, row in slices:
            for number, flat in enumerate(after):
                flat.reshape(-1, shape[2])[row : row + shape[1]] = base.read(parameter, first + number)
        return after

    return rows


def _pulled_rows(pulled: Pulled, tensor: str) -> Rows:
    """Carried back like a change from zero, as packing changes no place of the numbers."""
    flat = pulled.take(tensor)
    return lambda first, before: flat[first : first + len(before)].reshape(before.shape)
