"""e^x for MLX on a Linux CPU, and what is made of it.

The Linux wheel for x86-64 computes `mx.exp` a number at a time in vector code written for longer registers: 20 to 60 ns each,
the largest part of attention, of a gated layer and of the loss. `mx.power` goes through the C library: 6 ns. Elsewhere `mx.exp`
is used.
"""

import platform
import sys
from typing import Any

import mlx.core as mx

LOG2_E = 1.4426950408889634


def exp_is_slow(dtype: mx.Dtype) -> bool:
    """Whether `power` is to be used; in half precision the product inside would be rounded too much."""
    on_cpu: bool = mx.default_device() == mx.Device(mx.cpu)
    return sys.platform == "linux" and platform.machine() == "x86_64" and on_cpu and dtype == mx.float32


def exp(x: mx.array) -> mx.array:
    """e^x for each, 1e-6 relative down to e^-20."""
    return mx.power(2.0, x * LOG2_E) if exp_is_slow(x.dtype) else mx.exp(x)


def softmax(x: mx.array) -> mx.array:
    """Over the last axis, in which one entry at least is finite."""
    if not exp_is_slow(x.dtype):
        return mx.softmax(x, axis=-1, precise=True)
    raised = exp(x - x.max(-1, keepdims=True))
    return raised / (raised @ mx.ones((raised.shape[-1], 1)))  # BLAS sums faster and more exactly than MLX's sum on a CPU


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x, which keeps nothing but its arguments for the gradient."""
    product: Any = _swiglu(gate, x)
    result: mx.array = product
    return result


@mx.custom_function
def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    result: mx.array = (_forward if exp_is_slow(gate.dtype) else _fused_forward)(gate, x)
    return result


@_swiglu.vjp
def _swiglu_gradient(primals: Any, cotangent: Any, output: Any) -> tuple[mx.array, mx.array]:
    gate, x = primals
    result: tuple[mx.array, mx.array] = (_backward if exp_is_slow(gate.dtype) else _fused_backward)(gate, x, cotangent)
    return result


def _forward(gate: mx.array, x: mx.array) -> mx.array:
    return gate * _sigmoid(gate) * x


def _backward(gate: mx.array, x: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    return cotangent * x * (sigmoid + silu * (1 - sigmoid)), cotangent * silu


def _sigmoid(x: mx.array) -> mx.array:
    return 1 / (1 + exp(-x)) if exp_is_slow(x.dtype) else mx.sigmoid(x)


_fused_forward, _fused_backward = mx.compile(_forward, shapeless=True), mx.compile(_backward, shapeless=True)
