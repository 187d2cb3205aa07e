"""Who belongs together, and under which label, so that the test split keeps what it has as the collection grows."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mlx_finetune.data.fingerprint import Fingerprint, rank_of
from mlx_finetune.data.near import Near

GREETING = 8  # with fewer shingles a shared beginning makes no fork
Label = tuple[int, float, str]  # in the order in which labels win; the last is what is written


def place(text: str) -> float:
    """A number in [0, 1) that belongs to the text on every machine and for ever."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def place_in_test(group: str) -> float:
    """The group is in the test split where this is below its fraction.

    Another number than the group's own, or the test would take just those that validation by hash would.
    """
    return place(f"test {group}")


def label_of(group: str, rank: int) -> Label:
    """Of two clusters that join, that of the source with the lower rank wins, then the one that the test takes first.

    So that nothing ever leaves the test split when something new joins two clusters.
    """
    return rank, place_in_test(group), group


class Clusters:
    """Each of the numbers 0 to n - 1 begins alone and without a label (union-find)."""

    def __init__(self, n: int) -> None:
        self._parent = list(range(n))
        self._labels: dict[int, Label] = {}

    def root(self, i: int) -> int:
        """The number that stands for the whole cluster: its least."""
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        """The two belong together from now on, under one of their labels."""
        i, j = sorted((self.root(i), self.root(j)))
        if i != j:
            self._parent[j] = i
            labels = [self._labels.pop(root) for root in (i, j) if root in self._labels]
            if labels:
                self._labels[i] = min(labels)

    def together(self, i: int, j: int) -> bool:
        """Whether they belong together so far."""
        return self.root(i) == self.root(j)

    def offer(self, i: int, label: Label) -> None:
        """Its cluster has this label from now on, unless the one that it has wins."""
        root = self.root(i)
        self._labels[root] = min(label, self._labels.get(root, label))

    def label(self, i: int) -> str:
        """That of its cluster; empty where none was offered yet."""
        label = self._labels.get(self.root(i))
        return label[-1] if label else ""


def clustered(prints: Sequence[Fingerprint], read: Callable[[int], np.ndarray] | None, threshold: float) -> Clusters:
    """Conversations by index, clustered by what they share, near-duplicates too unless `read` (their shingles) is None.

    They are taken in the order in which they were begun, source by source, so that whoever comes later changes nothing of
    those before: each joins the clusters that it is linked to, or founds one under the label of its own group.
    """
    order = sorted(range(len(prints)), key=lambda i: _age(prints[i]))
    clusters = Clusters(len(prints))
    first: dict[tuple[Any, ...], int] = {}
    near = Near([prints[i] for i in order], lambda k: read(order[k]), threshold) if read else None
    for k, i in enumerate(order):
        for key in _keys(prints[i]):
            clusters.join(i, first.setdefault(key, i))
        if near:
            for other in near.like(k, lambda other: clusters.together(i, order[other])):  # noqa: B023  used at once
                clusters.join(i, order[other])
            near.add(k)
        if not clusters.label(i):
            clusters.offer(i, label_of(prints[i].group or prints[i].name, rank_of(prints[i].source)))
    return clusters


def _age(one: Fingerprint) -> tuple[Any, ...]:
    """Of a known time first; gptme's forks begin when what they fork from did, and their names lengthen its name."""
    return rank_of(one.source), not one.begun, one.begun, *one.tie


def _keys(one: Fingerprint) -> Iterator[tuple[Any, ...]]:
    """Who has one of them in common belongs together: the source's own group, an equal text, the beginning of a fork."""
    yield "exact", one.exact
    if one.group:
        yield one.source, one.group
    begun = int(np.searchsorted(one.seen, GREETING))  # a greeting alone makes no fork
    if begun < len(one.chain):
        yield "turn", int(one.chain[begun])
