"""The learning rate as a pure function of the step."""

import math

from mlx_finetune.config import RunConfig


def learning_rate(step: int, steps: int, config: RunConfig) -> float:
    """Rate of step `step` (from 0) of `steps`: a linear warmup, then by `lr_schedule`.

    cosine: half a cosine that ends near 0 (Loshchilov and Hutter 2017); linear: to near 0; constant; wsd: constant, and linearly to
    near 0 in the last `decay_ratio` of the steps (Hu et al. 2024).
    """
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    left = (steps - step) / max(math.ceil(config.decay_ratio * steps), 1)  # of the decay
    falls = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
        "wsd": min(1.0, left),
    }
    return config.learning_rate * falls[config.lr_schedule]
