"""A Hugging Face folder to the layout that mlx-lm stores, quantised where asked, one tensor in memory at a time.

Everything is built as MLX's lazy graph first (names by the class's own `sanitize`, then a cast, then `mx.quantize`), so that the
plan of the files is known; then each tensor is evaluated, written and let go.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_finetune.engines.mlx.load import DTYPES, open_model
from mlx_finetune.errors import UserError
from mlx_finetune.models.quantisation import Quantisation, favoured
from mlx_finetune.models.shards import Planned, ShardWriter, cut_into_shards

Arrays = dict[str, mx.array]
Progress = Callable[[int, int], None]
Layers = Mapping[str, Mapping[str, Any]]  # by module, what its `to_quantized` takes
Predicate = Callable[[str, nn.Module], bool | dict[str, Any]]

NAMES = {
    mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint8: "U8", mx.uint16: "U16", mx.uint32: "U32", mx.uint64: "U64",
    mx.int8: "I8", mx.int16: "I16", mx.int32: "I32", mx.int64: "I64", mx.bool_: "BOOL",
}  # fmt: skip
PART = 1 << 26  # bytes handed to the file at once
NUMBERS = 1 << 22  # of a weight quantised at once: some modes take tens of bytes for each while they compute


@dataclass(frozen=True)
class Packed:
    """What was written: `quantization` of config.json, the modules it left alone for their width, parameters and bytes."""

    quantization: dict[str, Any]
    left_alone: list[str]
    parameters: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Of all weights, the scales and what is not quantised counted in."""
        return 8 * self.bytes / self.parameters


def pack(model: Path, folder: Path, how: Quantisation | None, dtype: str | None, shard_size: int, progress: Progress) -> Packed:
    """Writes the weights of `model` into `folder` as `how` says. `progress(done, total)` counts bytes written.

    `dtype`: of scales, biases and what is not quantised; weights are rounded to it before they are quantised, as mlx-lm does.
    A checkpoint that is packed already, such as AWQ, stays as it is packed, and takes no `how`.

    Raises:
        UserError: an architecture that is not proven; tensors missing, too many or of another shape; nothing to quantise.
    """
    network, config = open_model(model)
    quantization: dict[str, Any] | None = config.get("quantization")
    assert not (how and quantization), "a packed model is not packed again"
    layers: dict[str, dict[str, Any]] = {}
    left_alone: list[str] = []
    if how:
        layers, quantization, left_alone = _layers(network, how, model)
    parameters = _count(network)
    weights = dict(tree_flatten(network.parameters()))
    if dtype:
        weights = _cast(network, weights, DTYPES[dtype])
    network.update(tree_map(lambda _: mx.array([]), network.parameters()))  # else it would hold each tensor that was written
    size = _write(network, weights, layers, folder, shard_size, progress)
    return Packed(quantization or {}, left_alone, parameters, size)


def _count(network: nn.Module) -> int:
    """Weights, however they are packed; scales and biases of groups are none."""
    count = 0
    for _, module in tree_flatten(network.leaf_modules(), is_leaf=nn.Module.is_module):
        own = dict(tree_flatten(module.parameters()))
        if "scales" in own:
            count += own["weight"].size * 32 // module.bits + (own["bias"].size if "bias" in own else 0)
        else:
            count += sum(value.size for value in own.values())
    return count


def _cast(network: nn.Module, weights: Arrays, dtype: mx.Dtype) -> Arrays:
    """Floating parameters in `dtype`, those left out that the class keeps as they are (`cast_predicate`)."""
    may = getattr(network, "cast_predicate", lambda name: True)
    return {n: v.astype(dtype) if mx.issubdtype(v.dtype, mx.floating) and may(n) else v for n, v in weights.items()}


def _layers(network: nn.Module, how: Quantisation, model: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any], list[str]]:
    """Settings by module; `quantization` as mlx-lm writes it, where only what differs is named; modules left for their width.

    As mlx-lm: what has `to_quantized` and a width that the group size divides, unless the class's own predicate says otherwise.
    """
    predicate: Predicate = getattr(network, "quant_predicate", None) or (lambda path, module: True)
    chosen: dict[str, dict[str, Any]] = {}
    quantization: dict[str, Any] = dict(how.settings)
    left_alone = []
    for path, module in tree_flatten(network.leaf_modules(), is_leaf=nn.Module.is_module):
        if not hasattr(module, "to_quantized"):
            continue
        own = predicate(path, module)
        if own and module.weight.shape[-1] % how.group_size:
            left_alone.append(path)
        elif isinstance(own, dict):
            _divides(path, module, own, model)
            chosen[path] = quantization[path] = own
        elif own:
            bits = how.more_bits if favoured(path, len(network.layers)) else how.bits
            chosen[path] = how.settings | {"bits": bits}
            if how.recipe:
                quantization[path] = chosen[path]
    if not chosen:
        raise UserError(f"{model}: no layer has a width that groups of {how.group_size} divide", hint="--group-size 32")
    return chosen, quantization, left_alone


def _divides(path: str, module: nn.Module, own: Mapping[str, Any], model: Path) -> None:
    if module.weight.shape[-1] % own["group_size"]:
        what = f"{path} is {module.weight.shape[-1]} wide, and its class asks for groups of {own['group_size']}"
        raise UserError(f"{model}: {what}", hint="leave --bits out")


def _quantised(value: mx.array, module: nn.Module, how: Mapping[str, Any]) -> Arrays:
    """Weight, scales, and biases where the mode has them, as the module packs them; lazy."""
    module.weight = value
    made = dict(tree_flatten(module.to_quantized(**how).parameters()))
    module.weight = mx.array([])
    return {part: array for part, array in made.items() if part != "bias"}


def _quantised_by_rows(value: mx.array, module: nn.Module, how: Mapping[str, Any]) -> Arrays:
    """The same numbers, evaluated some rows, or some experts, at a time, as no group reaches beyond its row."""
    step = max(1, NUMBERS * value.shape[0] // value.size)
    parts = []
    for start in range(0, value.shape[0], step):
        parts.append(_quantised(value[start : start + step], module, how))
        mx.eval(parts[-1])
    return {name: mx.concatenate([part[name] for part in parts]) for name in parts[0]}


def _write(network: nn.Module, weights: Arrays, layers: Layers, folder: Path, shard_size: int, progress: Progress) -> int:
    """Evaluates, writes and lets go of one after another; gives back the bytes."""
    modules = dict(tree_flatten(network.leaf_modules(), is_leaf=nn.Module.is_module))

    def made(name: str, value: mx.array, pack: Callable[..., Arrays]) -> Arrays:
        path = name.removesuffix(".weight")
        if path == name or path not in layers:
            return {name: value}
        return {f"{path}.{part}": array for part, array in pack(value, modules[path], layers[path]).items()}

    arrays = (made(name, value, _quantised) for name, value in weights.items())
    planned = {name: Planned(NAMES[array.dtype], tuple(array.shape)) for some in arrays for name, array in some.items()}
    total, done = sum(tensor.bytes for tensor in planned.values()), 0
    with ShardWriter(folder, cut_into_shards(planned, shard_size), {"format": "mlx"}) as writer:
        for name in list(weights):
            for part, array in made(name, weights.pop(name), _quantised_by_rows).items():
                writer.write(part, _bytes(array))
                done += planned[part].bytes
                progress(done, total)
            mx.clear_cache()  # Metal keeps what is freed
    return total


def _bytes(value: mx.array) -> Iterator[np.ndarray]:
    """Row-major, in parts."""
    flat = mx.contiguous(value).reshape(-1).view(mx.uint8)
    mx.eval(flat)
    whole: Any = np.asarray(flat)
    for start in range(0, len(whole), PART):
        yield whole[start : start + PART]
