"""The learning rate as a pure function of the step."""

import math

from mlx_finetune.config import RunConfig


def learning_rate(step: int, steps: int, config: RunConfig) -> float:
    """Rate of step `step` (from 0) of `steps`: linear warmup, then half a cosine that ends near 0 (Loshchilov and Hutter 2017)."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
