"""Rows folded into trees: tokens that several rows begin with stand there once, and each token attends along its own ancestry.

Windows of one conversation, turns with a context of their own, answers to one question and whole collections with the same system
prompt begin alike. A causal model computes the same for what is the same, so the loss and its gradient are those of the rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_finetune.data.batches import Batch

LEAST_SHARED = 32  # tokens; sharing fewer costs more than it saves


@dataclass(frozen=True)
class Segment:
    """Tokens `start` to `end` (exclusive), which see the ranges `sees` of earlier tokens whole and one another causally."""

    start: int
    end: int
    sees: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Placed:
    """A row of tokens, and where each of them stands in what is computed."""

    inputs: np.ndarray  # int32 [n]
    where: np.ndarray  # int32 [n], in the flattened inputs


@dataclass(frozen=True)
class Tree:
    """Rows folded together, one or more trees behind one another. A token may have several successors: `targets` name places."""

    inputs: np.ndarray  # int32 [T]
    positions: np.ndarray  # int32 [T]: how many tokens of its row stand before it
    segments: tuple[Segment, ...]  # in order, from 0 to T
    places: np.ndarray  # int32 [n]: of the tokens behind which something is learned
    targets: np.ndarray  # int32 [n]
    weights: np.ndarray  # float32 [n]
    rows: tuple[Placed, ...]


@dataclass(frozen=True)
class _Row:
    """What is read of a row: all up to its last learned token."""

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def plan(batches: Sequence[Batch], most: int) -> list[Tree]:
    """The rows of all `batches` as trees of at most `most` tokens each, or of one longer row; what begins alike stands together."""
    rows = sorted((row for batch in batches for row in _rows(batch)), key=lambda row: row.inputs.astype(">i4").tobytes())
    trees: list[Tree] = []
    taken: list[tuple[_Row, int]] = []  # rows of the next tree, and how many tokens each shares with the one before it
    size = 0
    for row in rows:
        shared = _shared(taken[-1][0], row) if taken else 0
        if taken and size + len(row.inputs) - shared > most:
            trees.append(_fold(taken))
            taken, size, shared = [], 0, 0
        taken.append((row, shared))
        size += len(row.inputs) - shared
    return [*trees, _fold(taken)]


def placed_rows(batch: Batch, width: int) -> tuple[Placed, ...]:
    """The rows of a batch of which the first `width` columns are computed."""
    found = []
    for number, row in enumerate(_rows(batch)):
        found.append(Placed(row.inputs, np.arange(len(row.inputs), dtype=np.int32) + number * width))
    return tuple(found)


def tokens_of(batches: Sequence[Batch]) -> int:
    """How many tokens are computed for rows as they are: up to the last learned one of each batch, padding included."""
    return sum(len(batch.inputs) * (int(batch.columns[-1]) + 1) for batch in batches)


def _rows(batch: Batch) -> Iterator[_Row]:
    for inputs, targets, weights in zip(batch.inputs, batch.targets, batch.weights, strict=True):
        learned = np.flatnonzero(weights > 0)
        if learned.size:
            end = int(learned[-1]) + 1
            yield _Row(inputs[:end], targets[:end], weights[:end])


def _shared(one: _Row, other: _Row) -> int:
    """How many tokens both begin with; 0 where they are too few."""
    length = min(len(one.inputs), len(other.inputs))
    differing = np.flatnonzero(one.inputs[:length] != other.inputs[:length])
    count = int(differing[0]) if differing.size else length
    return count if count >= LEAST_SHARED else 0


def _fold(rows: Sequence[tuple[_Row, int]]) -> Tree:
    """Rows in the order of their tokens. Each goes on from the one before it, whose ancestors it has as far as they are shared."""
    path: list[tuple[int, int]] = []  # ranges of tokens that the last row is made of
    segments: list[Segment] = []
    learned: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    inputs, positions, placed, total = [], [], [], 0
    for row, shared in rows:
        path = _first(path, shared)
        own = len(row.inputs) - shared
        if own:
            segments.append(Segment(total, total + own, tuple(path)))
            path = [*path, (total, total + own)]
            inputs.append(row.inputs[shared:])
            positions.append(np.arange(shared, len(row.inputs), dtype=np.int32))
            total += own
        where = np.concatenate([np.arange(low, high, dtype=np.int32) for low, high in path])
        placed.append(Placed(row.inputs, where))
        taught = row.weights > 0
        learned.append((where[taught], row.targets[taught], row.weights[taught]))
    places, targets, weights = _together(learned)
    return Tree(np.concatenate(inputs), np.concatenate(positions), tuple(segments), places, targets, weights, tuple(placed))


def _first(path: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The ranges of its first `count` tokens."""
    kept: list[tuple[int, int]] = []
    for low, high in path:
        if count <= 0:
            break
        kept.append((low, min(high, low + count)))
        count -= high - low
    return kept


def _together(learned: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What several rows learn behind the same tokens is learned once, with the sum of their weights."""
    places, targets, weights = (np.concatenate(each) for each in zip(*learned, strict=True))
    pairs, number = np.unique(np.stack([places, targets]), axis=1, return_inverse=True)
    return pairs[0].astype(np.int32), pairs[1].astype(np.int32), np.bincount(number.reshape(-1), weights).astype(np.float32)
