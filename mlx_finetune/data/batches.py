"""Example, Batch, and which examples a step sees: a pure function of (lengths, seed, step)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

WIDTHS = 32  # batches are padded to a multiple of this: few shapes, little tracing
NOISE = 1.02  # in the order of lengths, as a factor; more costs padding
RELATIVES = 4  # micro-batches of one family behind one another: what they begin with is computed once, and a step stays mixed


@dataclass(frozen=True)
class Example:
    """One rendered window; `weights[i]` is how much predicting `tokens[i]` counts."""

    tokens: np.ndarray  # int32 [T]
    weights: np.ndarray  # float32 [T]
    source: str
    conversation: str  # id
    turns: tuple[int, ...]  # places of the learned messages in the conversation
    exact_turns: int = 0  # how many of them stand after exactly the tokens that a server feeds
    own_context: bool = False  # whether its only turn has this context for itself
    family: str = ""  # of examples that begin alike for a good part

    def __post_init__(self) -> None:
        assert self.tokens.ndim == 1 and self.tokens.shape == self.weights.shape
        assert self.tokens.dtype == np.int32 and self.weights.dtype == np.float32
        assert is_learned(self.weights)


def is_learned(weights: np.ndarray) -> bool:
    """Whether something is learned by weights [T], and not the first token, which nothing predicts."""
    return bool(len(weights) and weights[0] == 0 and (weights >= 0).all() and 0 < weights.sum() < math.inf)


@dataclass(frozen=True)
class Batch:
    """Shifted and padded on the right once, here, so that no engine ever shifts or masks."""

    inputs: np.ndarray  # int32 [B, T]
    targets: np.ndarray  # int32 [B, T]
    weights: np.ndarray  # float32 [B, T], 0 where nothing is learned

    def __post_init__(self) -> None:
        assert self.inputs.ndim == 2 and self.inputs.shape == self.targets.shape == self.weights.shape
        assert self.inputs.dtype == self.targets.dtype == np.int32 and self.weights.dtype == np.float32
        assert self.learned > 0

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Batch":
        """Pads to the longest, rounded up to `WIDTHS`; a causal model never sees the padding from a learned place."""
        width = math.ceil(max(len(e.tokens) - 1 for e in examples) / WIDTHS) * WIDTHS
        inputs, targets = np.zeros((2, len(examples), width), np.int32)
        weights = np.zeros((len(examples), width), np.float32)
        for row, e in enumerate(examples):
            n = len(e.tokens) - 1
            inputs[row, :n], targets[row, :n], weights[row, :n] = e.tokens[:-1], e.tokens[1:], e.weights[1:]
        return cls(inputs, targets, weights)

    @property
    def columns(self) -> np.ndarray:
        """int32 [n]: the places in which any row learns something; the head of the model is needed nowhere else."""
        return np.flatnonzero((self.weights > 0).any(axis=0)).astype(np.int32)

    @property
    def learned(self) -> float:
        """Sum of the weights: the number of learned tokens where every weight is 1."""
        return float(self.weights.sum(dtype=np.float64))


def steps_per_epoch(examples: int, batch_size: int, accumulation: int) -> int:
    """Steps in which every example is seen once; the last ones may be smaller."""
    return math.ceil(math.ceil(examples / batch_size) / accumulation)


def examples_at(
    lengths: tuple[int, ...], batch_size: int, accumulation: int, seed: int, step: int, families: tuple[int, ...] = ()
) -> list[list[int]]:
    """The micro-batches of step `step` (from 0), as indices. Each epoch has every example exactly once."""
    epoch, place_in_epoch = divmod(step, steps_per_epoch(len(lengths), batch_size, accumulation))
    return _epoch(lengths, batch_size, seed, epoch, families)[place_in_epoch * accumulation :][:accumulation]


def efficiency(lengths: tuple[int, ...], batch_size: int, seed: int) -> float:
    """Which part of the tokens that the first epoch reads are no padding."""
    known = np.array(lengths)
    slots = sum(len(indices) * int(widths(known[indices]).max()) for indices in _epoch(lengths, batch_size, seed, 0))
    return float((known - 1).sum()) / slots


def widths(lengths: np.ndarray) -> np.ndarray:
    """Of examples alone in a batch: the last token is only a target."""
    return np.ceil((lengths - 1) / WIDTHS) * WIDTHS


@lru_cache(maxsize=2)
def _epoch(lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int, families: tuple[int, ...] = ()) -> list[list[int]]:
    """Near in length share a micro-batch (little padding), with noise so that neighbours change; micro-batches are shuffled.

    Those whose first examples are of one family (`families[i]`; none: each is alone) stay together, a few at a time.
    """
    random = np.random.default_rng((seed, epoch))
    noisy = widths(np.array(lengths)) * random.uniform(1 / NOISE, NOISE, len(lengths))
    order = np.argsort(noisy, kind="stable").tolist()
    micro_batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    groups = _relatives(micro_batches, families) if families else [[batch] for batch in micro_batches]
    return [batch for i in random.permutation(len(groups)) for batch in groups[i]]


def _relatives(micro_batches: Sequence[list[int]], families: Sequence[int]) -> list[list[list[int]]]:
    """Micro-batches by family, in the order of their examples: those that begin most alike are neighbours there."""
    found: dict[int, list[list[int]]] = {}
    for batch in sorted(micro_batches, key=lambda batch: batch[0]):
        found.setdefault(families[batch[0]], []).append(batch)
    return [all_[i : i + RELATIVES] for all_ in found.values() for i in range(0, len(all_), RELATIVES)]
