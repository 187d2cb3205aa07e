"""All examples of one split, counted from the arrays that the engine is fed, without their text."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROWS_AT_ONCE = 500
COLUMNS = ("source", "conversation", "turns", "tokens", "weights")


@dataclass(frozen=True)
class Overview:
    """The examples in order, and every learned turn in order."""

    sources: tuple[str, ...]
    conversations: tuple[str, ...]  # ids
    turns: np.ndarray  # int64 [N], how many are learned
    tokens: np.ndarray  # int64 [N]
    learned: np.ndarray  # int64 [N], tokens whose weight is not 0
    weighed: np.ndarray  # int64 [N], those of them whose weight is not 1
    turn_examples: np.ndarray  # int64 [M], in which example each turn is learned
    turn_messages: np.ndarray  # int64 [M], its place in the conversation
    turn_tokens: np.ndarray  # int64 [M], all that the model writes of it; 0 where that cannot be told

    def __len__(self) -> int:
        return len(self.sources)

    def part(self, index: int) -> tuple[int, int]:
        """Which of the examples of its conversation this one is, from 1, and how many there are."""
        start, end = index, index + 1
        while start > 0 and self.conversations[start - 1] == self.conversations[index]:
            start -= 1
        while end < len(self) and self.conversations[end] == self.conversations[index]:
            end += 1
        return index - start + 1, end - start


def overview(path: Path, control: Collection[int]) -> Overview:
    """Counts what stands in the Arrow file of a split, a few hundred examples at a time. `control`: ids of control tokens."""
    sources, conversations = list[str](), list[str]()
    counts, turns = [np.zeros((0, 4), np.int64)], [np.zeros((0, 3), np.int64)]
    ids = np.array(sorted(control), np.int32)
    for source, conversation, places, tokens, weights in _rows(path):
        lengths = _turn_lengths(tokens, weights, len(places), ids)
        turns.append(np.stack([np.full(len(places), len(sources)), places, lengths], axis=1))
        learned = np.count_nonzero(weights)
        counts.append(np.array([[len(places), len(tokens), learned, learned - np.count_nonzero(weights == 1)]]))
        sources.append(source)
        conversations.append(conversation)
    return Overview(tuple(sources), tuple(conversations), *np.concatenate(counts).T, *np.concatenate(turns).T)


def _rows(path: Path) -> Iterator[tuple[Any, ...]]:
    """Of each example what stands in `COLUMNS`, arrays without copying them."""
    from datasets import Dataset as ArrowDataset

    for batch in ArrowDataset.from_file(str(path)).with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
        for row in zip(*(batch[name] for name in COLUMNS), strict=True):
            yield (*(each.as_py() for each in row[:2]), *(each.values.to_numpy() for each in row[2:]))


def _turn_lengths(tokens: np.ndarray, weights: np.ndarray, turns: int, control: np.ndarray) -> np.ndarray:
    """int64 [turns], 0 where it cannot be told."""
    found = turn_places(tokens, weights, turns, control)
    return found[:, 1] - found[:, 0] if len(found) else np.zeros(turns, np.int64)


def turn_places(tokens: np.ndarray, weights: np.ndarray, turns: int, control: np.ndarray) -> np.ndarray:
    """int64 [turns, 2]: the first learned token of each turn and the one behind its last; [0, 2] where that cannot be told.

    A turn is one learned stretch, or several up to a control token: it has several where it holds what stands for a secret, which
    is not learned.
    """
    learned = np.concatenate([[False], weights > 0, [False]])
    starts, ends = np.flatnonzero(np.diff(learned.astype(np.int8))).reshape(-1, 2).T
    last = np.arange(len(ends)) if len(ends) == turns else np.flatnonzero(np.isin(tokens[ends - 1], control))
    if len(last) != turns:
        return np.zeros((0, 2), np.int64)
    first = np.concatenate([[0], last[:-1] + 1]).astype(np.int64)
    return np.stack([starts[first], ends[last]], axis=1).astype(np.int64)
