"""LoRA on the experts of a mixture, plain or quantised: mlx-lm's SwitchLinear with a pair of matrices for each expert."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear

from mlx_finetune.engines.adapter import Target
from mlx_finetune.engines.experts import EXPERTS, PROJECTIONS

SWITCH = "switch_mlp"
RENAMED = ("mixtral", "minimax", "phimoe")  # transformers 5 has mlp where it had, and mlx-lm has, block_sparse_moe


class LoRASwitch(nn.Module):
    """linear(x) + scale * B A x of the expert that each row is sent to, the adapter in float32 whatever the base is in."""

    def __init__(self, linear: nn.Module, target: Target, rank: int, scale: float, dropout: float) -> None:
        """`linear`: the frozen layer [experts, out, in], quantised or not."""
        super().__init__()
        self.linear, self.scale, self.rate = linear, scale, dropout
        self._key: mx.array | None = None
        self.lora_A = mx.zeros((target.count, rank, target.columns))
        self.lora_B = mx.zeros((target.count, target.rows, rank))

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """[S, 1, in] and each row's expert [S], or [..., 1, 1, in] and each token's [..., k] -> [S, 1, out] or [..., k, 1, out]."""
        base: mx.array = self.linear(x, indices, sorted_indices=sorted_indices)
        low = self.scale * _product(self._dropped(x, indices), self.lora_A, indices, sorted_indices)
        return base + _product(low, self.lora_B, indices, sorted_indices).astype(base.dtype)

    def _dropped(self, x: mx.array, indices: mx.array) -> mx.array:
        """Anew of a token for each expert that it is sent to; by a key of its own, so that computed again it drops the same."""
        if self._key is None or not self.rate:
            return x
        shape = (*indices.shape, *x.shape[-2:])
        kept = mx.random.bernoulli(1 - self.rate, shape, key=self._key)
        return mx.broadcast_to(x, shape) * kept.astype(x.dtype) * (1 / (1 - self.rate))


def expert_targets(model: nn.Module) -> dict[str, tuple[str, Target]]:
    """Each projection of each layer's experts, by the path that PEFT gives it: its path in the model, and what it is."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, SwitchGLU):
            at = path.removesuffix(SWITCH) + EXPERTS if path.endswith(f".{SWITCH}") else path
            at = at.replace(".block_sparse_moe.", ".mlp.") if getattr(model, "model_type", "") in RENAMED else at
            for name in PROJECTIONS:
                layer: Any = module[name]
                count, rows, columns = layer.weight.shape
                columns = layer.input_dims if isinstance(layer, QuantizedSwitchLinear) else columns
                if isinstance(layer, QuantizedSwitchLinear | SwitchLinear) and "bias" not in layer:
                    found[f"{at}.{name}"] = f"{path}.{name}", Target(rows, columns, "experts", count)
    return found


def _product(x: mx.array, matrices: mx.array, indices: mx.array, is_sorted: bool) -> mx.array:
    """x M^T in float32 with the matrix [experts, out, in] of each row's expert."""

    def plain(x: mx.array, matrices: mx.array) -> mx.array:
        wide = x.astype(mx.float32)
        return mx.gather_mm(wide, matrices.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=is_sorted)

    return plain(x, matrices)
