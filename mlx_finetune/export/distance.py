"""How far the logits of one model lie from those of another, and what the comparison of a fused model found."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


class VerificationError(RuntimeError):
    """The fused weights are not base + what was trained: a fault of this program, never of its user."""


@dataclass(frozen=True)
class Distance:
    """How far logits lie from the reference: largest and root mean square of the differences, and mean KL in nats."""

    largest: float
    rms: float
    kl: float


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


def largest(logits: Sequence[np.ndarray]) -> float:
    """The largest absolute logit."""
    return float(max(np.abs(rows).max() for rows in logits))


def _kl(expected: np.ndarray, found: np.ndarray) -> float:
    """KL(expected || found) of two rows of logits [V], nats, in float64."""
    log_p, log_q = (_log_softmax(row.astype(np.float64)) for row in (expected, found))
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def _log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row - row.max()
    return shifted - np.log(np.exp(shifted).sum())
