"""Norms and gated layers of transformers in fewer passes over memory, and with less kept for the gradient.

A module is taken over where the text of its class is the one that is known here; any other is left as it is.
"""

import inspect
import types
from typing import Any

import torch
import torch.nn.functional as F

from mlx_finetune.engines.torch.joint import CALLS, NAMES, Joint
from mlx_finetune.engines.torch.lora import LoRALinear

GATED = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
NORM = """hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)"""
LEARNED = ("gate_proj", "up_proj", "down_proj")


def take_over(model: torch.nn.Module, joint: bool) -> None:
    """Norms whose weight is frozen, gates with SiLU, and with `joint` projections of attention, whose weights are then one array.

    Call it once the adapters are there.
    """
    for module in model.modules():
        text = _text(module)
        if NORM in text and not module.weight.requires_grad:
            module.forward = types.MethodType(_norm, module)
        elif GATED in text and isinstance(module.act_fn, torch.nn.SiLU | _silu()):
            plain = all(_is_plain(getattr(module, name)) for name in LEARNED)
            module.forward = types.MethodType(_mlp if plain else _gated, module)
        elif joint and all(call in text for call in CALLS) and all(_is_plain(getattr(module, name)) for name in NAMES):
            layers = [getattr(module, name) for name in NAMES]
            if len({layer.base.bias is None for layer in layers}) == 1:
                Joint(layers)


def _text(module: Any) -> str:
    try:
        return inspect.getsource(type(module).forward)
    except (OSError, TypeError):  # written in C, or by a decorator
        return ""


def _is_plain(module: Any) -> bool:
    """An adapter without magnitudes on weights that are stored as they multiply."""
    plain = isinstance(module, LoRALinear) and not hasattr(module, "lora_magnitude_vector")
    return plain and type(module.base) is torch.nn.Linear


def _silu() -> type:
    from transformers.activations import ACT2CLS

    found = ACT2CLS["silu"]
    kind: type = found[0] if isinstance(found, tuple) else found
    return kind


def _norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
    return output


def _gated(self: Any, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))
    return output


def _mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    layers = [getattr(self, name) for name in LEARNED]
    if any(layer.drops for layer in layers):
        return _gated(self, x)
    arrays = [array for layer in layers for array in (layer.lora_A, layer.lora_B)]
    output: torch.Tensor = GatedLayer.apply(x, layers, *arrays)
    return output


class RMSNorm(torch.autograd.Function):
    """weight * x / rms(x) (Zhang and Sennrich 2019), in float32 inside; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """[..., D] -> the same."""
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        """Of x."""
        x, weight, scale = ctx.saved_tensors
        wide, scaled = x.float(), (upstream[0] * weight).float()
        along = (scaled * wide).sum(-1, keepdim=True).mul_(scale**3 / -x.shape[-1])
        return scaled.mul_(scale).addcmul_(wide, along).to(x.dtype), None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020); keeps its two arguments alone."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """[...] of both -> [...]."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of both."""
        gate, up = ctx.saved_tensors
        return _of_gate(gate, up, upstream[0])


def _of_gate(gate: torch.Tensor, up: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten.silu_backward(upstream * up, gate), F.silu(gate).mul_(upstream)


class GatedLayer(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) of three layers with plain adapters; what is between them is computed again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layers: list[LoRALinear], *arrays: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]; `arrays`: A and B of each layer."""
        flat = x.reshape(-1, x.shape[-1])
        (gate, low_gate), (up, low_up) = (_through(layer, flat) for layer in layers[:2])
        output, low_down = _through(layers[2], F.silu(gate).mul_(up))
        ctx.layers, ctx.shape = layers, x.shape
        ctx.save_for_backward(flat, gate, up, low_gate, low_up, low_down)
        return output.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        """Of x, and of A and B of each layer."""
        flat, gate, up, *lows = ctx.saved_tensors
        gradient = upstream[0].reshape(-1, upstream[0].shape[-1])
        product, of_down = _back(ctx.layers[2], F.silu(gate).mul_(up), lows[2], gradient)
        of_both = _of_gate(gate, up, product)
        of_x, of_gate = _back(ctx.layers[0], flat, lows[0], of_both[0])
        of_x, of_up = _back(ctx.layers[1], flat, lows[1], of_both[1], of_x)
        return of_x.reshape(ctx.shape), None, *of_gate, *of_up, *of_down


def _through(layer: LoRALinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, in] -> [T, out] and A x [T, rank]."""
    low = x @ layer.lora_A.to(x.dtype).T
    return F.linear(x, layer.base.weight, layer.base.bias).addmm_(low, layer.lora_B.to(x.dtype).T, alpha=layer.scale), low


def _back(
    layer: LoRALinear, x: torch.Tensor, low: torch.Tensor, upstream: torch.Tensor, of_x: torch.Tensor | None = None
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Gradients of x (added to `of_x`, where that is given) and of A and B."""
    of_low = (upstream @ layer.lora_B.to(x.dtype)).mul_(layer.scale)
    weight = layer.base.weight
    of_x = upstream @ weight if of_x is None else of_x.addmm_(upstream, weight)
    of_b = (low.T @ upstream).T.mul_(layer.scale).float()
    return of_x.addmm_(of_low, layer.lora_A.to(x.dtype)), ((of_low.T @ x).float(), of_b)
