"""Twenty seconds of real steps with the real engine: what this machine reaches."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_finetune.config import make_config
from mlx_finetune.data.batches import Batch
from mlx_finetune.planning.memory import Dials
from mlx_finetune.planning.model_shape import ModelShape
from mlx_finetune.planning.speed import work_of_token

SECONDS = 20.0
LENGTH = 1024  # tokens of a step, at most
DIALS = ("num_layers", "rank", "target_modules", "attention", "grad_checkpoint")


@dataclass(frozen=True)
class Calibration:
    """What steps of this model reached on this machine."""

    steps: int
    tokens_per_second: float
    operations_per_second: float
    device: str


def calibrate(
    folder: Path, shape: ModelShape, dials: Dials, seconds: float = SECONDS, progress: Callable[[int, int], None] | None = None
) -> Calibration:
    """Loads the model and trains on random tokens for about so long; nothing is kept. `progress(done, total)`: milliseconds.

    Raises:
        UserError: what the engine refuses.
    """
    from mlx_finetune.engines.mlx.engine import MlxEngine

    length = min(LENGTH, dials.max_length)
    settings = {name: getattr(dials, name) for name in DIALS}
    dtype = dials.dtype if dials.bits >= 16 else "auto"
    config = make_config(settings | {"batch_size": 1, "max_length": length, "dtype": dtype}, "the plan")
    engine = MlxEngine(folder, config)
    batch = random_batch(np.random.default_rng(0), 1, length, shape.sizes.vocabulary, dials.learned_share)
    engine.step([batch], 1e-5, seed=0)  # compiles and allocates
    start, steps, total = time.perf_counter(), 0, round(1000 * seconds)
    while steps < 2 or time.perf_counter() - start < seconds:
        engine.step([batch], 1e-5, seed=steps)
        steps += 1
        if progress:
            progress(min(round(1000 * (time.perf_counter() - start)), total), total)
    rate = steps * length / (time.perf_counter() - start)
    return Calibration(steps, rate, rate * work_of_token(shape, dials, length).operations, engine.device)


def random_batch(random: np.random.Generator, rows: int, length: int, vocabulary: int, learned_share: float) -> Batch:
    """[rows, length] of random tokens, of which a share is learned."""
    tokens = random.integers(0, vocabulary, (rows, length + 1)).astype(np.int32)
    weights = np.zeros((rows, length), np.float32)
    for row in weights:
        row[random.permutation(length)[: max(1, round(learned_share * length))]] = 1
    return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), weights)
