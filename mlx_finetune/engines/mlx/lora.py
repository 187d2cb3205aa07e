"""LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024) beside frozen layers, plain or quantised."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class LoRALinear(nn.Module):
    """linear(x) + scale * B A x, the adapter in float32 whatever the base is in.

    With DoRA each row of the sum, which is as long as it may be, is made as long as `lora_magnitude_vector` says.
    """

    def __init__(self, linear: nn.Module, shape: tuple[int, int], rank: int, scale: float, dropout: float, dora: bool) -> None:
        """`linear`: the frozen layer, quantised or not; `shape`: its (out, in)."""
        super().__init__()
        self.linear, self.scale, self.rate = linear, scale, dropout
        self._key: mx.array | None = None
        self.lora_A = mx.zeros((rank, shape[1]))
        self.lora_B = mx.zeros((shape[0], rank))
        if dora:
            self.lora_magnitude_vector = mx.ones((shape[0],))
            self._squares = mx.square(row_norms(linear))

    def __call__(self, x: mx.array) -> mx.array:
        """[..., in] -> [..., out]."""
        low = self.scale * _product(self._dropped(x), self.lora_A)
        dora = "lora_magnitude_vector" in self
        base = self._unbiased(x) if dora else self.linear(x)
        fits = base.dtype == mx.float32
        summed = mx.addmm(base, low, self.lora_B.T) if fits else base + (low @ self.lora_B.T).astype(base.dtype)
        if not dora:
            return summed
        summed = summed * (self.lora_magnitude_vector / self._lengths()).astype(base.dtype)
        return summed + self.linear.bias if "bias" in self.linear else summed

    def _unbiased(self, x: mx.array) -> mx.array:
        output: mx.array = self.linear(x)
        return output - self.linear.bias if "bias" in self.linear else output

    def _lengths(self) -> mx.array:
        """Of the rows of W + scale * B A, float32 [out], which no gradient goes through; W is never written out.

        |w + s b A|^2 = |w|^2 + 2 s b (w A^T) + s^2 b (A A^T) b^T, and the layer itself computes W A^T.
        """
        a, b = mx.stop_gradient(self.lora_A), mx.stop_gradient(self.lora_B)
        dtype = self.linear.get("scales", self.linear.weight).dtype
        like = a.astype(dtype) if mx.issubdtype(dtype, mx.floating) else a  # scales of mxfp4 are bytes
        crossed = self._unbiased(like).astype(mx.float32).T  # [out, rank]
        squares = self._squares + (b * (2 * self.scale * crossed + self.scale**2 * (b @ (a @ a.T)))).sum(1)
        return mx.stop_gradient(mx.sqrt(squares))

    def _dropped(self, x: mx.array) -> mx.array:
        """By a key of its own, so that activations computed again drop the same."""
        if self._key is None or not self.rate:
            return x
        kept = mx.random.bernoulli(1 - self.rate, x.shape, key=self._key)
        return x * kept.astype(x.dtype) * (1 / (1 - self.rate))


class LoRAEmbedding(nn.Module):
    """embedding(tokens) + scale * (B A)^T of their rows, and as a head the same weight.

    `lora_embedding_A` is [rank, vocabulary], `lora_embedding_B` [width, rank].
    """

    def __init__(self, embedding: nn.Module, shape: tuple[int, int], rank: int, scale: float) -> None:
        """`embedding`: the frozen layer, quantised or not; `shape`: (vocabulary, width)."""
        super().__init__()
        self.embedding, self.scale = embedding, scale
        self.lora_embedding_A = mx.zeros((rank, shape[0]))
        self.lora_embedding_B = mx.zeros((shape[1], rank))

    @property
    def linear(self) -> nn.Module:
        """The frozen layer."""
        return self.embedding

    def __call__(self, tokens: mx.array) -> mx.array:
        """[...] -> [..., width]."""
        base: mx.array = self.embedding(tokens)
        return base + (self.scale * (self.lora_embedding_A.T[tokens] @ self.lora_embedding_B.T)).astype(base.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """[..., width] -> [..., vocabulary]."""
        base: mx.array = self.embedding.as_linear(x)
        return base + (self.scale * (x.astype(mx.float32) @ self.lora_embedding_B @ self.lora_embedding_A)).astype(base.dtype)


class _Noisy:
    """Stands in for embeddings and adds noise to what they give."""

    def __init__(self, embedding: nn.Module, noise: mx.array) -> None:
        self._embedding, self._noise = embedding, noise

    def __call__(self, tokens: mx.array) -> mx.array:
        embedded: mx.array = self._embedding(tokens)
        return embedded + self._noise.astype(embedded.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._embedding, name)


@contextmanager
def noisy(backbone: nn.Module, embeddings: str, noise: mx.array | None) -> Iterator[None]:
    """Inside, `noise` [B, T, D] is added to the embeddings, which `backbone` has by that name."""
    own = backbone[embeddings]
    if noise is not None:
        backbone[embeddings] = _Noisy(own, noise)
    try:
        yield
    finally:
        backbone[embeddings] = own


def row_norms(linear: Any) -> mx.array:
    """The length of each row of the weight as the layer uses it, float32 [out]."""
    weight = linear.weight
    if "scales" in linear:
        how = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
        weight = mx.dequantize(weight, linear.scales, linear.get("biases"), **how)
    norms = mx.linalg.norm(weight.astype(mx.float32), axis=1)
    mx.eval(norms)
    return norms


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
