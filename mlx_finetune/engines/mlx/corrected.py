"""Where mlx-lm 0.32.2 computes otherwise than the model was trained: its layers are given what transformers computes."""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma, gpt_neox, starcoder2


class GemmaMLP(gemma.MLP):
    """GELU by tanh, as Gemma's config.json says; mlx-lm takes the exact one: 4e-4 of the largest logit."""

    def __call__(self, x: mx.array) -> mx.array:
        """[..., hidden] -> the same."""
        output: mx.array = self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))
        return output


class Starcoder2MLP(starcoder2.MLP):
    """GELU by tanh, as StarCoder2's config.json says; mlx-lm takes the exact one: 2e-4 of the largest logit."""

    def __call__(self, x: mx.array) -> mx.array:
        """[..., hidden] -> the same."""
        output: mx.array = self.c_proj(nn.gelu_approx(self.c_fc(x)))
        return output


class NeoXMLP(gpt_neox.MLP):
    """The exact GELU, as GPT-NeoX's config.json says; mlx-lm takes the one by tanh: 3e-4 of the largest logit."""

    def __call__(self, x: mx.array) -> mx.array:
        """[..., hidden] -> the same."""
        output: mx.array = self.dense_4h_to_h(nn.gelu(self.dense_h_to_4h(x)))
        return output


CLASSES: Mapping[type[nn.Module], type[nn.Module]] = {
    gemma.MLP: GemmaMLP,
    starcoder2.MLP: Starcoder2MLP,
    gpt_neox.MLP: NeoXMLP,
}


def correct(model: nn.Module) -> None:
    """Gives each layer of a class that errs the class that does not; the weights stay where they are."""
    for module in model.modules():
        right: Callable[..., Any] | None = CLASSES.get(type(module))
        if right is not None:
            module.__class__ = right
