"""Where mlx-lm 0.32.2 computes otherwise than the model was trained: its layers are given what transformers computes."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma, gpt_neox, starcoder2
from mlx_lm.models.rope_utils import YarnRoPE


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


def correct(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Gives each layer of a class that errs the class that does not; the weights stay where they are."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for module in model.modules():
        right: Callable[..., Any] | None = CLASSES.get(type(module))
        if right is not None:
            module.__class__ = right
        if isinstance(module, YarnRoPE) and rope.get("truncate") is False:
            module._freqs = _yarn(module.dims, rope, float(rope.get("rope_theta") or config["rope_theta"]))


def _yarn(dims: int, rope: Mapping[str, Any], base: float) -> mx.array:
    """Frequencies of YaRN (Peng et al. 2023) [dims / 2] with the ends of its ramp where they are; mlx-lm rounds them to whole
    dimensions, which gpt-oss was not trained with: 5e-3 of the largest logit."""
    length, factor = rope["original_max_position_embeddings"], rope["factor"]

    def end(rotations: float) -> float:
        return dims * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(end(rope.get("beta_fast") or 32), 0), min(end(rope.get("beta_slow") or 1), dims - 1)
    ramp = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / max(high - low, 1e-3), 0, 1)
    plain = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    frequencies: mx.array = (factor * plain * plain) / (factor * plain * (1 - ramp) + plain * ramp)
    return frequencies
