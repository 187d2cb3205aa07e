"""Two models on the same conversations: the difference of their means, and how sure it is.

Of each conversation two sums are known: what a model scored (of tokens: weight times loss; of turns: those that were good), and
what that is divided by (the weights; the turns that count). The mean of a model is the one sum over all conversations divided by
the other, so that each token counts by its weight. A bootstrap draws as many conversations as there are, with replacement, and
computes the difference of the two means (tuned minus base) over those drawn, `SAMPLES` times; the interval goes from the 2.5th
to the 97.5th percentile of these differences (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
Conversations are drawn, not tokens, because tokens of one conversation are alike; both models are scored on the same draw,
because a hard conversation is hard for both. With few conversations such an interval is too narrow.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SAMPLES = 2000
UNIT = "conversation"
PERCENT = (2.5, 97.5)
AT_ONCE = 2_000_000  # numbers held at once


@dataclass(frozen=True)
class Difference:
    """Means of base and tuned, tuned minus base, and its 95 % interval; None where there is nothing to compute it from."""

    base: float | None
    tuned: float | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Sums:
    """float64 [conversations] each: what each model scored, and what that is divided by."""

    base: np.ndarray
    tuned: np.ndarray
    of_base: np.ndarray
    of_tuned: np.ndarray


def sums_of(
    conversations: Sequence[int] | np.ndarray,
    base: np.ndarray,
    tuned: np.ndarray,
    of_base: np.ndarray,
    of_tuned: np.ndarray,
) -> Sums:
    """Added up by conversation; conversations that nothing is divided by are left out. All arguments have one length."""
    _, whose = np.unique(np.asarray(conversations), return_inverse=True)
    added = [np.bincount(whose, each.astype(np.float64)) for each in (base, tuned, of_base, of_tuned)]
    there = (added[2] > 0) | (added[3] > 0)
    return Sums(*(each[there] for each in added))


def compare_means(sums: Sums, seed: int, samples: int = SAMPLES) -> Difference:
    """With an interval where each model is scored on two conversations or more."""
    base, tuned = _mean(sums.base, sums.of_base), _mean(sums.tuned, sums.of_tuned)
    if base is None or tuned is None:
        return Difference(base, tuned)
    fewest = min(np.count_nonzero(sums.of_base), np.count_nonzero(sums.of_tuned))
    low, high = _interval(sums, seed, samples) if fewest > 1 else (None, None)
    return Difference(base, tuned, tuned - base, low, high)


def _mean(scored: np.ndarray, of: np.ndarray) -> float | None:
    return float(scored.sum() / of.sum()) if of.sum() > 0 else None


def _interval(sums: Sums, seed: int, samples: int) -> tuple[float | None, float | None]:
    random, count = np.random.default_rng(seed), len(sums.base)
    found = []
    rows = max(AT_ONCE // count, 1)
    for done in range(0, samples, rows):
        drawn = random.multinomial(count, np.full(count, 1 / count), min(rows, samples - done)).astype(np.float64)
        means = [drawn @ each for each in (sums.base, sums.tuned, sums.of_base, sums.of_tuned)]
        told = (means[2] > 0) & (means[3] > 0)  # a draw in which one model has nothing says nothing
        found.append(means[1][told] / means[3][told] - means[0][told] / means[2][told])
    differences = np.concatenate(found)
    if not differences.size:
        return None, None
    low, high = np.percentile(differences, PERCENT).tolist()
    return low, high
