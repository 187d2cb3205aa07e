"""Queries, keys and values of attention as one product: their weights lie behind one another, and so do their adapters."""

from typing import Any

import torch
import torch.nn.functional as F

from mlx_finetune.engines.torch.lora import LoRALinear

NAMES = ("q_proj", "k_proj", "v_proj")
CALLS = tuple(f"self.{name}(hidden_states)" for name in NAMES)


class Joint:
    """Stands behind three layers of one attention: the first that is called computes for all, the others take what is theirs."""

    def __init__(self, layers: list[LoRALinear]) -> None:
        """`layers`: plain adapters on layers that read the same; their weights become parts of one array."""
        self.layers = layers
        self.weight = torch.cat([layer.base.weight.data for layer in layers])
        for layer, part in zip(layers, self.weight.split([layer.base.out_features for layer in layers]), strict=True):
            layer.base.weight.data = part
        biases = [layer.base.bias for layer in layers]
        self.bias = None if biases[0] is None else torch.cat([bias.data for bias in biases])
        self._of: torch.Tensor | None = None
        self._made: tuple[torch.Tensor, ...] = ()
        for number, layer in enumerate(layers):
            layer.forward = self._caller(number)  # type: ignore[method-assign]

    def _caller(self, number: int) -> Any:
        def call(x: torch.Tensor) -> torch.Tensor:
            if number == 0 and not self.layers[0].drops:
                arrays = [array for layer in self.layers for array in (layer.lora_A, layer.lora_B)]
                self._of, self._made = x, _Projections.apply(x, self, *arrays)
            if self._of is not x:  # dropout acts, or it is called in another order or with something else
                return LoRALinear.forward(self.layers[number], x)
            made = self._made[number]
            if number == len(self.layers) - 1:
                self._of, self._made = None, ()
            return made

        return call


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, joint: Joint, *arrays: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ torch.cat(arrays[::2]).to(x.dtype).T
        outputs = F.linear(flat, joint.weight, joint.bias).split([layer.base.out_features for layer in joint.layers], 1)
        lows = low.split([a.shape[0] for a in arrays[::2]], 1)
        made = []
        for layer, output, part in zip(joint.layers, outputs, lows, strict=True):
            summed = torch.addmm(output, part, layer.lora_B.to(x.dtype).T, alpha=layer.scale)
            made.append(summed.reshape(*x.shape[:-1], -1))
        ctx.joint, ctx.shape = joint, x.shape
        ctx.save_for_backward(flat, low)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        flat, low = ctx.saved_tensors
        layers = ctx.joint.layers
        parts = [each.reshape(-1, each.shape[-1]) for each in upstream]
        lows = low.split([layer.lora_A.shape[0] for layer in layers], 1)
        of_low = torch.cat([(g @ layer.lora_B.to(g.dtype)).mul_(layer.scale) for g, layer in zip(parts, layers, strict=True)], 1)
        of_b = [(part.T @ g).T.mul_(layer.scale).float() for g, part, layer in zip(parts, lows, layers, strict=True)]
        of_a = (of_low.T @ flat).float().split([layer.lora_A.shape[0] for layer in layers])
        of_x = None
        if ctx.needs_input_grad[0]:
            a = torch.cat([layer.lora_A for layer in layers]).to(flat.dtype)
            of_x = (torch.cat(parts, 1) @ ctx.joint.weight).addmm_(of_low, a).reshape(ctx.shape)
        return of_x, None, *(array for pair in zip(of_a, of_b, strict=True) for array in pair)
