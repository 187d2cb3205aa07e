"""The base as it was trained on: its packed weights, unpacked, in the layout of the original checkpoint.

A model trained on packed weights is exactly itself only with them. What packing lost is then in the fused model too.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.export.changes import read_changes
from mlx_finetune.export.rows import Change, Headers, Rows, original
from mlx_finetune.files import read_json
from mlx_finetune.models.weights import TensorLocation, tensor_headers

BASE = "give the model that it was converted from"
Packed = Mapping[str, TensorLocation]


def changes_from_packed(model: Path, packed: Path, checkpoint: Path) -> dict[str, Change]:
    """What becomes of the tensors of `model`: the numbers of `packed`, and on them what the checkpoint trained.

    Raises:
        UserError: `packed` is not made of `model`, or as `read_changes`.
    """
    unpacked = _unpacked(model, packed)
    trained = read_changes(model, checkpoint)
    both = {name: Change(one.location, partial(_one_after_other, unpacked.get(name), one)) for name, one in trained.items()}
    return dict(sorted((unpacked | both).items(), key=lambda item: (item[1].location.file.name, item[1].location.start)))


def _one_after_other(first: Change | None, then: Change) -> Rows:
    rows, after = first.open_rows() if first else (lambda start, before: before), then.open_rows()
    return lambda start, before: after(start, rows(start, before))


def _unpacked(model: Path, packed: Path) -> dict[str, Change]:
    from mlx_finetune.engines.mlx.load import empty_model
    from mlx_finetune.engines.mlx.pullback import Sources, Unmapped

    headers, _ = original(model)
    stored = tensor_headers(packed)
    parameters = [name.removesuffix(".scales") + ".weight" for name in stored if name.endswith(".scales")]
    try:
        sources = Sources(lambda: empty_model(model), {name: one.shape for name, one in headers.items()}, parameters)
        groups = sources.groups()
    except Unmapped as error:
        raise UserError(f"{packed}: {error} in {model}", hint=BASE) from error
    settings = read_json(packed / "config.json")["quantization"]
    read = lru_cache(maxsize=1)(partial(_read, packed, settings))
    changes: dict[str, Change] = {}
    for group in groups:
        for tensor, rows in _of_group(group, sources, headers, read).items():
            changes[tensor] = Change(headers[tensor], rows)
    return changes


def _of_group(group: list[str], sources: Any, headers: Headers, read: Callable[[str], np.ndarray]) -> dict[str, Callable[[], Rows]]:
    if len(group) == 1 and group[0] in sources.same:
        return {sources.of[group[0]][0]: partial(_instead, group[0], None, read)}
    if len(group) == 1 and group[0] in sources.stacks:
        return {tensor: partial(_instead, group[0], number, read) for number, tensor in enumerate(sources.of[group[0]])}
    tensors = sorted({tensor for parameter in group for tensor in sources.of[parameter]})
    pulled = lru_cache(maxsize=1)(lambda: _pulled(group, sources, read))
    return {tensor: partial(_pulled_rows, tensor, pulled) for tensor in tensors}


def _instead(parameter: str, number: int | None, read: Callable[[str], np.ndarray]) -> Rows:
    """Rows of the parameter, or of one expert of it, whatever stood there."""
    whole = read(parameter)
    matrix = whole if number is None else whole[number]
    flat = matrix.reshape(len(matrix), -1)
    return lambda first, before: flat[first : first + len(before)]


def _pulled(group: list[str], sources: Any, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """As all that is packed is a rearrangement of what it was made of, its numbers are carried back like any change from zero."""
    import mlx.core as mx

    return {name: np.array(array) for name, array in sources.pull(group, [mx.array(read(one)) for one in group]).items()}


def _pulled_rows(tensor: str, pulled: Callable[[], dict[str, np.ndarray]]) -> Rows:
    array = pulled()[tensor]
    flat = array.reshape(len(array), -1)
    return lambda first, before: flat[first : first + len(before)].reshape(before.shape)


def _read(packed: Path, settings: Mapping[str, Any], parameter: str) -> np.ndarray:
    """The unpacked numbers of a parameter, float32."""
    import mlx.core as mx

    module = parameter.removesuffix(".weight")
    own = settings.get(module)
    how = own if isinstance(own, Mapping) else settings
    arrays = {part: _array(packed, f"{module}.{part}") for part in ("weight", "scales", "biases")}
    weight = mx.dequantize(
        arrays["weight"], arrays["scales"], arrays["biases"],
        group_size=how["group_size"], bits=how["bits"], mode=how.get("mode", "affine"), dtype=mx.float32,
    )  # fmt: skip
    return np.array(weight)


@lru_cache(maxsize=2)
def _headers(packed: Path) -> Packed:
    return tensor_headers(packed)


def _array(packed: Path, name: str) -> Any:
    """A stored tensor, read when it is computed with; None where there is none."""
    import mlx.core as mx

    location = _headers(packed).get(name)
    if location is None:
        return None
    stored: Any = mx.load(str(location.file))
    return stored[name]
