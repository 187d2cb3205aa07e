"""How far the logits of one model lie from those of another, and what the comparison of a fused model found."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

TOLERANCE = 1e-3  # between two float32 sums of the same numbers in another order, many layers deep
# Two engines sum the same numbers in another order and by other kernels: of the largest logit, beside TOLERANCE. Measured were
# 3e-6 for SmolLM2, and up to 2.6e-4 where MLX takes another GELU than transformers.
ENGINES = 3e-4


class VerificationError(RuntimeError):
    """The fused weights are not base + what was trained: a fault of this program, never of its user."""


@dataclass(frozen=True)
class Distance:
    """How far logits lie from the reference: largest and root mean square of the differences, and mean KL in nats."""

    largest: float
    rms: float
    kl: float


@dataclass(frozen=True)
class Choices:
    """Greedy tokens of two models behind the same text: how many were looked at, are the same, or are tied.

    A tie: both models hold the two tokens so near to each other that what the logits may differ by decides between them.
    """

    tokens: int = 0
    same: int = 0
    tied: int = 0

    @property
    def different(self) -> int:
        """How many are neither."""
        return self.tokens - self.same - self.tied


@dataclass(frozen=True)
class Distances:
    """From the tuned model (base + checkpoint) to the base alone, to its weights rounded as stored, and to the fused folder.

    fused_to_rounded tells a rounded weight from a wrong one, which could hide behind the rounding of all the others.
    """

    base: Distance
    rounded: Distance
    fused: Distance
    fused_to_rounded: Distance
    largest_logit: float
    missing: list[str]
    unexpected: list[str]


@dataclass(frozen=True)
class Measured:
    """`rows`: the tokens of each text and what the tuned model answers it; `reference`: its logits [T, V] there; `found`: the
    fused model's."""

    distances: Distances
    rows: list[list[int]]
    reference: list[np.ndarray]
    found: list[np.ndarray]


def distance(reference: Sequence[np.ndarray], other: Iterable[np.ndarray]) -> Distance:
    """Over logits [T, V] of each text; NaN anywhere makes it NaN, which passes no comparison."""
    largest, squares, numbers, divergence, positions = 0.0, 0.0, 0, 0.0, 0
    for expected, found in zip(reference, other, strict=True):
        difference = np.abs(expected - found)
        largest = float(np.maximum(largest, difference.max()))
        squares += float(np.square(difference, dtype=np.float64).sum())
        numbers += difference.size
        divergence += sum(_kl(*rows) for rows in zip(expected, found, strict=True))
        positions += len(expected)
    return Distance(largest, (squares / numbers) ** 0.5, divergence / positions)


def choices(reference: Sequence[np.ndarray], other: Iterable[np.ndarray], tolerance: float) -> Choices:
    """Of logits [T, V] of each text: the greedy tokens at all places.

    Where no logit differs by more than `tolerance`, two greedy tokens differ only if each model holds them within twice that.
    """
    tokens, same, tied = 0, 0, 0
    for expected, found in zip(reference, other, strict=True):
        for here, there in zip(expected, found, strict=True):
            a, b = int(here.argmax()), int(there.argmax())
            tokens += 1
            same += a == b
            tied += a != b and bool(max(here[a] - here[b], there[b] - there[a]) <= 2 * tolerance)
    return Choices(tokens, same, tied)


def largest(logits: Sequence[np.ndarray]) -> float:
    """The largest absolute logit."""
    return float(max(np.abs(rows).max() for rows in logits))


def _kl(expected: np.ndarray, found: np.ndarray) -> float:
    """KL(expected || found) of two rows of logits [V], nats, in float64."""
    log_p, log_q = (_log_softmax(row.astype(np.float64)) for row in (expected, found))
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def _log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row - row.max()
    logs: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return logs
