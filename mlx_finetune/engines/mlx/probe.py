"""Logits of a folder in MLX, in float32: as we load it, as mlx-lm does unaided, or with packed weights unpacked for use."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import load_model as load_mlx_lm

from mlx_finetune.engines.mlx.load import load_model
from mlx_finetune.errors import UserError

Tokens = Sequence[Sequence[int]]


def logits(folder: Path, tokens: Tokens, rounded: str | None = None, unpacked: bool = False) -> list[np.ndarray]:
    """Of each text [T, V], as our engine loads the folder; `rounded`: with weights rounded to that dtype first.

    `unpacked`: each packed weight is unpacked to float32 when its layer is computed, and multiplied like any other; one at a time.
    """
    network = load_model(folder, rounded or "float32")
    return list(_run(_widened(network, UNPACKED if unpacked else PACKED), tokens))


def plain_logits(folder: Path, tokens: Tokens) -> list[np.ndarray] | None:
    """Of each text [T, V], as `mlx_lm.load` reads the folder by its config.json alone; None where it cannot."""
    try:
        network, _ = load_mlx_lm(folder, lazy=True, trust_remote_code=False)
    except (KeyError, TypeError, ValueError):
        return None
    return list(_run(_widened(network, PACKED), tokens))


def _widened(network: nn.Module, kinds: "Kinds") -> nn.Module:
    """All in float32, scales too: what they stand for stays the same, and nothing that is computed with them is rounded."""

    def other(path: str, module: nn.Module) -> nn.Module:
        if "scales" not in module:
            return module
        if type(module) not in KNOWN:
            raise UserError(f"{path}: a {type(module).__name__} cannot be compared yet", hint="--no-verify")
        return kinds[type(module)](module) if type(module) in kinds else module

    network.set_dtype(mx.float32)
    network.update_modules(tree_map_with_path(other, network.leaf_modules(), is_leaf=nn.Module.is_module))
    return network


def _run(network: nn.Module, tokens: Tokens) -> Iterator[np.ndarray]:
    for row in tokens:
        yield np.array(network(mx.array([row]))[0].astype(mx.float32))
    mx.clear_cache()


class _Packed(nn.Module):
    """Stands for a packed layer."""

    def __init__(self, packed: nn.Module) -> None:
        super().__init__()
        self.packed = packed

    def _weight(self) -> mx.array:
        """It exists only while it is multiplied with."""
        p: Any = self.packed
        how = {"group_size": p.group_size, "bits": p.bits, "mode": p.mode}
        return mx.dequantize(p["weight"], p["scales"], p.get("biases"), dtype=mx.float32, **how)


class _WideEmbedding(_Packed):
    """The packed rows, which without scales in a floating dtype come out in bfloat16: exact, but what follows would be rounded."""

    def __call__(self, tokens: mx.array) -> mx.array:
        rows: mx.array = self.packed(tokens).astype(mx.float32)
        return rows

    def as_linear(self, x: mx.array) -> mx.array:
        logits: mx.array = self.packed.as_linear(x)
        return logits


class _UnpackedLinear(_Packed):
    def __call__(self, x: mx.array) -> mx.array:
        y = x @ self._weight().T
        return y + self.packed["bias"] if "bias" in self.packed else y


class _UnpackedEmbedding(_Packed):
    def __call__(self, tokens: mx.array) -> mx.array:
        return self._weight()[tokens]

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ self._weight().T


class _UnpackedExperts(_Packed):
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        weight = self._weight().swapaxes(-1, -2)
        y = mx.gather_mm(x, weight, rhs_indices=indices, sorted_indices=sorted_indices)
        return y + mx.expand_dims(self.packed["bias"][indices], -2) if "bias" in self.packed else y


Kinds = Mapping[type[nn.Module], type[_Packed]]
UNPACKED: Kinds = {
    nn.QuantizedLinear: _UnpackedLinear,
    nn.QuantizedEmbedding: _UnpackedEmbedding,
    QuantizedSwitchLinear: _UnpackedExperts,
}
PACKED: Kinds = {nn.QuantizedEmbedding: _WideEmbedding}
KNOWN = frozenset(UNPACKED)
