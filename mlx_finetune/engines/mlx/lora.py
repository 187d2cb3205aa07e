"""LoRA beside a frozen linear layer (Hu et al. 2021)."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class LoRALinear(nn.Module):
    """linear(x) + scale * B A x, the adapter in float32 whatever the base is in."""

    def __init__(self, linear: nn.Module, shape: tuple[int, int], rank: int, scale: float, dropout: float) -> None:
        """`linear`: the frozen layer, quantised or not; `shape`: its (out, in)."""
        super().__init__()
        self.linear, self.scale, self.rate = linear, scale, dropout
        self._key: mx.array | None = None
        self.lora_A = mx.zeros((rank, shape[1]))
        self.lora_B = mx.zeros((shape[0], rank))

    def __call__(self, x: mx.array) -> mx.array:
        """[..., in] -> [..., out]."""
        low = self.scale * _product(self._dropped(x), self.lora_A)
        base = self.linear(x)
        if base.dtype == mx.float32:
            return mx.addmm(base, low, self.lora_B.T)
        return base + (low @ self.lora_B.T).astype(base.dtype)

    def _dropped(self, x: mx.array) -> mx.array:
        """By a key of its own, so that activations computed again drop the same."""
        if self._key is None or not self.rate:
            return x
        kept = mx.random.bernoulli(1 - self.rate, x.shape, key=self._key)
        return x * kept.astype(x.dtype) * (1 / (1 - self.rate))


def _product(x: mx.array, a: mx.array) -> mx.array:
    """x A^T in float32. [..., in], [rank, in] -> [..., rank]."""
    if x.dtype == mx.float32:
        return x @ a.T
    product: Any = _widened(x, a)
    result: mx.array = product
    return result


@mx.custom_function
def _widened(x: mx.array, a: mx.array) -> mx.array:
    """What is kept for the gradient is `x` as it is: a float32 copy for each adapted layer would be twice as large."""
    return x.astype(mx.float32) @ a.T


@_widened.vjp
def _widened_gradient(primals: Any, cotangent: Any, output: Any) -> tuple[mx.array, mx.array]:
    x, a = primals
    rows = cotangent.reshape(-1, a.shape[0])
    return (cotangent @ a).astype(x.dtype), rows.T @ x.reshape(-1, a.shape[1]).astype(mx.float32)


def set_dropout(model: nn.Module, seed: int | None) -> None:
    """Gives each adapter its key for one forward pass; None: nothing is dropped."""
    layers = list(_adapters(model))
    keys = mx.random.split(mx.random.key(seed), len(layers)) if seed is not None and layers else [None] * len(layers)
    for layer, key in zip(layers, keys, strict=True):
        layer._key = key


def _adapters(model: nn.Module) -> Iterator[LoRALinear]:
    return (module for _, module in sorted(model.named_modules()) if isinstance(module, LoRALinear))
