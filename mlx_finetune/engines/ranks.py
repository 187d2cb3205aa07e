"""The processes that train one model together: how many there are, which one this is, and sums over all of them."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mlx_finetune.errors import UserError

GONE = "the last checkpoint is whole: the same command with --resume goes on, on as many processes as there are"


class PeerGone(UserError):
    """Another process of the run does not answer any more."""

    def __init__(self, said: str) -> None:
        super().__init__(f"another process of this run is gone ({said})", hint=GONE)


class Ranks(Protocol):
    """`rank` of `size` processes, counted from 0; number 0 alone writes."""

    @property
    def rank(self) -> int:
        """Of this process."""

    @property
    def size(self) -> int:
        """How many processes."""

    def sum(self, numbers: np.ndarray) -> np.ndarray:
        """float64 [n] -> their sums over all processes, the same on each. Waits for the others."""


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1

    def sum(self, numbers: np.ndarray) -> np.ndarray:
        """See `Ranks.sum`."""
        return numbers


def agree(ranks: Ranks, **brought: str) -> None:
    """Raises UserError, on every process, with the names of what they do not all bring alike."""
    digests = [hashlib.sha256(what.encode()).digest()[:16] for what in brought.values()]
    digest = np.frombuffer(b"".join(digests), np.uint8).astype(np.float64)
    sums = ranks.sum(np.concatenate([digest, digest**2]))
    mean, square = np.split(sums / ranks.size, 2)
    apart = (np.abs(square - mean**2) > 0.1).reshape(len(brought), -1)
    if apart.any():
        names = " and ".join(name for name, row in zip(brought, apart, strict=True) if row.any())
        hint = "the same command, data, model and, to go on, run folder are needed on each machine"
        raise UserError(f"the processes of this run do not train the same: not the same {names}", hint=hint)


def any_of(ranks: Ranks, said: bool) -> bool:
    """Whether any process says so; the same answer on each."""
    return bool(ranks.sum(np.array([float(said)]))[0])
