"""What an adapter of mlx-lm changes in the original weights: LoRA, DoRA or whole weights, of any architecture that mlx-lm loads.

Its names are those of mlx-lm's class. Where a parameter is a tensor of the checkpoint, or a stack of them as of experts, the
matrices are added as they are; elsewhere the change is carried back through the class's own `sanitize`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.export.rows import BASE, DIVERGED, HEAD_WEIGHT, Change, Headers, Rows, factored, fitting, original
from mlx_finetune.files import read_json
from mlx_finetune.models.weights import TensorLocation, file_headers, read_float32

CONFIG, TENSORS = "adapter_config.json", "adapters.safetensors"
KINDS = ("lora", "dora", "full")
FINISHED = "train it again, or name another adapter"
Parts = dict[str, TensorLocation]  # of a module: lora_a, lora_b, m; of a parameter trained itself: ""


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

    kind, scale = _settings(adapter / CONFIG)
    parts = _parts(adapter / TENSORS, kind)
    headers, is_tied = original(model)
    place = _Place(model, headers)
    try:
        sources = Sources(place.make, {name: one.shape for name, one in headers.items()}, parts)
        groups = sources.groups()
    except Unmapped as error:
        raise UserError(f"{adapter}: {error}", hint=BASE) from error
    changes: dict[str, Change] = {}
    for group in groups:
        for tensor, rows in _of_group(group, sources, parts, scale, place).items():
            changes[tensor] = Change(fitting(model, headers, tensor, headers[tensor].shape, f"{adapter} changes"), rows)
    twins = [name for name in changes if is_tied and name != HEAD_WEIGHT and name.endswith(("embed_tokens.weight", "wte.weight"))]
    if twins and HEAD_WEIGHT in headers:  # the shared weight is stored twice
        changes[HEAD_WEIGHT] = Change(headers[HEAD_WEIGHT], changes[twins[0]].open_rows)
    return changes


class _Place:
    """The model as mlx-lm's class has it, without its weights, and the original's weights in that class's layout."""

    def __init__(self, model: Path, headers: Headers) -> None:
        self._folder, self._files = model, sorted({one.file for one in headers.values()})
        self._made: dict[str, Any] | None = None

    def make(self) -> Any:
        """A fresh one, not evaluated."""
        from mlx_finetune.engines.mlx.load import empty_model

        return empty_model(self._folder)

    def is_embedding(self, module: str) -> bool:
        """Whether the module looks tokens up; its matrices are the other way round."""
        import mlx.nn as nn

        return isinstance(dict(self.make().named_modules()).get(module), nn.Embedding)

    def weight(self, parameter: str) -> np.ndarray:
        """Of the original, float32, in the layout of mlx-lm's class."""
        import mlx.core as mx

        if self._made is None:
            stored: dict[str, Any] = {}
            for file in self._files:
                stored |= mx.load(str(file))  # type: ignore[arg-type]
            model = self.make()
            self._made = model.sanitize(stored) if hasattr(model, "sanitize") else stored
        return np.array(self._made[parameter].astype(mx.float32))


def _settings(path: Path) -> tuple[str, float]:
    """Kind, and what B A is multiplied by."""
    config = read_json(path)
    kind = config.get("fine_tune_type", "lora")
    scale = 1.0 if kind == "full" else (config.get("lora_parameters") or {}).get("scale")
    if kind not in KINDS or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise UserError(f"{path}: fine_tune_type {kind!r} with scale {scale!r} is no adapter of mlx-lm", hint=FINISHED)
    return kind, float(scale)


def _parts(path: Path, kind: str) -> dict[str, Parts]:
    """Of each parameter of the model what the file holds."""
    found: dict[str, Parts] = {}
    for name, location in file_headers(path).items():
        module, _, leaf = name.rpartition(".")
        if kind == "full":
            found[name] = {"": location}
        elif leaf in ("lora_a", "lora_b", "m"):
            found.setdefault(f"{module}.weight", {})[leaf] = location
        else:
            raise UserError(f"{path}: {name} is no matrix of {kind}", hint=FINISHED)
    wanted = {"lora": {"lora_a", "lora_b"}, "dora": {"lora_a", "lora_b", "m"}, "full": {""}}[kind]
    for parameter, own in found.items():
        if own.keys() != wanted:
            raise UserError(f"{path}: {parameter} has {', '.join(sorted(own))} and not {', '.join(sorted(wanted))}", hint=FINISHED)
    if not found:
        raise UserError(f"{path}: no tensors", hint=FINISHED)
    return found


def _of_group(
    group: Sequence[str], sources: Any, parts: Mapping[str, Parts], scale: float, place: _Place
) -> dict[str, Callable[[], Rows]]:
    """What becomes of the rows of each tensor that the parameters of a group are made of."""
    parameter = group[0]
    own = parts[parameter]
    if len(group) == 1 and "" not in own:
        if parameter in sources.same and len(sources.shapes[parameter]) == 3 and "m" not in own:
            return {sources.of[parameter][0]: partial(_stack_rows, parameter, own, scale, sources.shapes[parameter])}
        if parameter in sources.same:
            return {sources.of[parameter][0]: partial(_factored_rows, parameter, own, scale, place, sources.shapes[parameter])}
        if parameter in sources.stacks and "m" not in own:
            shape, experts = sources.shapes[parameter], enumerate(sources.of[parameter])
            return {tensor: partial(_expert_rows, parameter, own, scale, number, shape) for number, tensor in experts}
    pulled = _Pulled(group, sources, parts, scale, place)
    tensors = sorted({tensor for parameter in group for tensor in sources.of[parameter]})
    return {tensor: partial(pulled.rows, tensor) for tensor in tensors}


def _factored_rows(parameter: str, own: Parts, scale: float, place: _Place, shape: tuple[int, ...]) -> Rows:
    left, right = _factors(parameter, own, scale, place.is_embedding(parameter.removesuffix(".weight")), shape)
    return factored(left, right, _finite(own["m"], parameter) if "m" in own else None)


def _expert_rows(parameter: str, own: Parts, scale: float, number: int, shape: tuple[int, ...]) -> Rows:
    a, b = _stacked(parameter, own, shape)
    return factored(np.float32(scale) * b[number], a[number], None)


def _stack_rows(parameter: str, own: Parts, scale: float, shape: tuple[int, ...]) -> Rows:
    """Of one tensor [E, out, in] for all experts, of which a row is an expert."""
    a, b = _stacked(parameter, own, shape)

    def rows(first: int, before: np.ndarray) -> np.ndarray:
        after = np.empty_like(before)
        for number, row in enumerate(before):
            after[number] = row + np.float32(scale) * (b[first + number] @ a[first + number]).ravel()
        return after

    return rows


def _stacked(parameter: str, own: Parts, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A [E, r, in] and B [E, out, r] of experts, of which mlx-lm has A as [E r, in] or as [E, r, in]."""
    a, b = _finite(own["lora_a"], parameter), _finite(own["lora_b"], parameter)
    experts, _, columns = shape
    a = a.reshape(experts, -1, columns) if a.size % (experts * columns) == 0 else a
    if a.ndim != 3 or b.ndim != 3 or (experts, b.shape[1], columns) != shape or b.shape[2] != a.shape[1] or len(b) != experts:
        raise UserError(f"{own['lora_a'].file}: {parameter} {list(shape)} does not take A {list(a.shape)}, B {list(b.shape)}", BASE)
    return a, b


def _factors(
    parameter: str, own: Parts, scale: float, on_embeddings: bool, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """scale * B [rows, r] and A [r, columns] of the parameter."""
    a, b = _finite(own["lora_a"], parameter), _finite(own["lora_b"], parameter)
    left, right = (a, b) if on_embeddings else (np.ascontiguousarray(b.T), np.ascontiguousarray(a.T))
    if left.ndim != 2 or right.ndim != 2 or (left.shape[0], right.shape[1]) != shape or left.shape[1] != right.shape[0]:
        raise UserError(f"{own['lora_a'].file}: {parameter} {list(shape)} does not take {list(a.shape)}, {list(b.shape)}", BASE)
    return np.float32(scale) * left, right


def _finite(location: TensorLocation, parameter: str) -> np.ndarray:
    array = read_float32(location)
    if not np.isfinite(array).all():
        raise UserError(f"{location.file}: {parameter} has numbers that are not finite", hint=DIVERGED)
    return array


class _Pulled:
    """The changes of a group of parameters, carried back once and kept until each tensor of it is written."""

    def __init__(self, group: Sequence[str], sources: Any, parts: Mapping[str, Parts], scale: float, place: _Place) -> None:
        self._group, self._sources, self._parts, self._scale, self._place = group, sources, parts, scale, place
        self._left: dict[str, np.ndarray] = {}

    def rows(self, tensor: str) -> Rows:
        """What becomes of the rows of one tensor; each is asked for once."""
        from mlx_finetune.engines.mlx.pullback import Unmapped

        if tensor not in self._left:
            import mlx.core as mx

            changes = [mx.array(self._change(parameter)) for parameter in self._group]
            try:
                pulled = self._sources.pull(self._group, changes)
            except Unmapped as error:
                raise UserError(f"{error}: it has no place in the checkpoint", hint="leave that module out") from error
            self._left = {name: np.array(array) for name, array in pulled.items()}
        change = self._left.pop(tensor)
        flat = change.reshape(change.shape[0] if change.ndim else 1, -1)
        return lambda first, before: before + flat[first : first + len(before)].reshape(before.shape)

    def _change(self, parameter: str) -> np.ndarray:
        """Of the parameter, float32, in its own shape."""
        own, shape = self._parts[parameter], self._sources.shapes[parameter]
        if "" in own:
            trained = _finite(own[""], parameter)
            if trained.shape != shape:
                raise UserError(f"{own[''].file}: {parameter} is {list(trained.shape)}, the model has {list(shape)}", hint=BASE)
            return trained - self._place.weight(parameter)
        if len(shape) == 3:
            a, b = _stacked(parameter, own, shape)
            return np.float32(self._scale) * (b @ a)
        on_embeddings = self._place.is_embedding(parameter.removesuffix(".weight"))
        left, right = _factors(parameter, own, self._scale, on_embeddings, shape)
        if "m" not in own:
            return left @ right
        before = self._place.weight(parameter)
        return factored(left, right, _finite(own["m"], parameter))(0, before) - before
