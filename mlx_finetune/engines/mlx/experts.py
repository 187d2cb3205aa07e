"""LoRA on the experts of a mixture, plain or quantised: mlx-lm's SwitchLinear with a pair of matrices for each expert."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear

from mlx_finetune.config import RunConfig
from mlx_finetune.engines.adapter import Target, scale_of
from mlx_finetune.engines.experts import EXPERTS, PROJECTIONS
from mlx_finetune.models.tensor_names import transformers_name

Names = Iterable[tuple[str, str]]  # see `names_of`
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


def expert_targets(model: nn.Module, names: Names) -> dict[str, Target]:
    """Each projection of each layer's experts that can be adapted, by the path that PEFT gives it."""
    return {path: target for path, _, target in projections(model, names)}


def adapt_experts(
    model: nn.Module, names: Names, targets: Mapping[str, Target], config: RunConfig
) -> tuple[dict[str, LoRASwitch], dict[str, str]]:
    """Adapters of the experts among `targets`, not put in yet, and what PEFT calls them; both by the path in the model."""
    modules, adapted, called = dict(model.named_modules()), dict[str, LoRASwitch](), dict[str, str]()
    for path, own, target in projections(model, names):
        if path in targets:
            adapted[own] = LoRASwitch(modules[own], target, config.rank, scale_of(config), config.dropout)
            called[own] = path
    return adapted, called


def projections(model: nn.Module, names: Names) -> Iterator[tuple[str, str, Target]]:
    """PEFT's path, that in the model, and what it is."""
    for path, module in model.named_modules():
        if not isinstance(module, SwitchGLU):
            continue
        at = path.removesuffix(SWITCH) + EXPERTS if path.endswith(f".{SWITCH}") else path
        at = at.replace(".block_sparse_moe.", ".mlp.") if getattr(model, "model_type", "") in RENAMED else at
        for name in PROJECTIONS:
            layer: Any = module[name]
            if isinstance(layer, QuantizedSwitchLinear | SwitchLinear) and "bias" not in layer:
                target = Target(layer.output_dims, layer.input_dims, "experts", layer.num_experts)
                yield transformers_name(f"{at}.{name}", names), f"{path}.{name}", target


def _product(x: mx.array, matrices: mx.array, indices: mx.array, is_sorted: bool) -> mx.array:
    """x M^T in float32 with the matrix [experts, out, in] of each row's expert; what is kept for the gradient is `x` as it is."""

    def plain(x: mx.array, matrices: mx.array) -> mx.array:
        wide = x.astype(mx.float32)
        return mx.gather_mm(wide, matrices.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=is_sorted)

    if x.dtype == mx.float32:
        return plain(x, matrices)
    narrow: Any = mx.custom_function(plain)

    @narrow.vjp
    def gradient(primals: Any, cotangent: Any, output: Any) -> tuple[mx.array, ...]:
        return tuple(mx.vjp(plain, list(primals), [cotangent])[1])

    product: mx.array = narrow(x, matrices)
    return product
