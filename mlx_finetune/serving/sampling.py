"""How the next token is drawn from logits: in numpy, the same on either engine."""

from dataclasses import dataclass

import numpy as np

from mlx_finetune.engines.answers import Choose

FIRST = 1024  # of the likeliest tokens, which nearly always hold the share asked for: sorting all takes ten times as long


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 takes the likeliest token, whatever the others say."""

    temperature: float = 0.0
    top_p: float = 1.0  # the likeliest tokens that together are at least so probable
    top_k: int = 0  # only so many of the likeliest; 0: all
    min_p: float = 0.0  # only those at least so probable, as a share of the likeliest one's probability
    seed: int | None = None  # None: another answer each time

    def chooser(self) -> Choose | None:
        """For one answer; None where the likeliest is taken."""
        if self.temperature == 0:
            return None
        generator = np.random.default_rng(self.seed)
        return lambda logits: int(generator.choice(len(logits), p=self.probabilities(logits)))

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """float64 [V], of which the sum is 1. Tokens that are equally likely at an edge of what stays all stay."""
        below = logits.astype(np.float64) - logits.max()
        with np.errstate(over="ignore"):  # of a tiny temperature: all but the likeliest are infinitely far below
            likely = np.exp(below / self.temperature)
        likely /= likely.sum()
        least = max(self.min_p * likely.max(), _of_place(likely, self.top_k), _of_share(likely, self.top_p))
        kept = np.where(likely >= least, likely, 0.0)
        return np.asarray(kept / kept.sum())


def _of_place(likely: np.ndarray, count: int) -> float:
    """The probability of the `count`-th likeliest."""
    return float(np.partition(likely, -count)[-count]) if 0 < count < len(likely) else 0.0


def _of_share(likely: np.ndarray, share: float) -> float:
    """The probability of the last one that is needed to reach `share`."""
    if share >= 1:
        return 0.0
    for count in (min(FIRST, len(likely)), len(likely)):
        falling = np.sort(np.partition(likely, -count)[-count:])[::-1]
        reached = np.cumsum(falling)
        if reached[-1] >= share:
            break
    return float(falling[min(int(np.searchsorted(reached, share)), len(falling) - 1)])
