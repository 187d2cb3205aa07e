"""Whether a checkpoint can be run here in float32, asked before anything is written."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from mlx_finetune.models.weights import TensorLocation, tensor_headers
from mlx_finetune.training.memory_watch import loading

FLOAT32 = 4  # bytes
HEADROOM = 1.15  # of the weights in float32: what else is held while they are run
BY_WEIGHTS = "--by-weights proves what is written without running it"


@dataclass(frozen=True)
class Shortage:
    """Bytes that running takes, and that are free: fewer."""

    needed: float
    free: float

    def __str__(self) -> str:
        return f"{self.needed / 1e9:.1f} GB of memory in float32, and {self.free / 1e9:.1f} GB are free"


def shortage(model: Path) -> Shortage | None:
    """What running the model of a folder in float32 takes, where that is more than is free; None where it fits."""
    needed = HEADROOM * FLOAT32 * sum(map(_numbers, tensor_headers(model).values()))
    free = float(psutil.virtual_memory().available)
    return Shortage(needed, free) if needed > free else None


def _numbers(tensor: TensorLocation) -> int:
    """mxfp4 has two numbers in a byte; bytes that are something else are few."""
    return math.prod(tensor.shape) * (2 if tensor.dtype == "U8" else 1)


@contextmanager
def running(model: Path) -> Iterator[None]:
    """Inside models are run: where there is no memory for them, that is one line.

    Raises:
        UserError: what MLX, torch or numpy say where they get no memory.
    """
    with loading(model, "run it in float32", BY_WEIGHTS):
        yield
