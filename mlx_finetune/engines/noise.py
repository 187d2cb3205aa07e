"""NEFTune's noise on embeddings (Jain et al. 2023), drawn by numpy: both engines add the same."""

import numpy as np


def noise_of(alpha: float, shape: tuple[int, int, int], seed: int, number: int) -> np.ndarray:
    """Uniform in +-alpha / sqrt(T * D), float32 [B, T, D], of micro-batch `number` in the step with `seed`."""
    bound = np.float32(alpha / np.sqrt(shape[1] * shape[2]))
    random = np.random.default_rng((seed, number, 1))
    return (2 * random.random(shape, dtype=np.float32) - 1) * bound
