"""What stands twice in a collection: equal conversations, forks and beginnings of others, and near-duplicates.

Everything is decided from small fingerprints, so that no text need be held. Each turn is learned once: a conversation whose
turns are all learned in others is dropped; of a fork that has turns of its own the shared ones become context. Nothing depends
on the order in which conversations are read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_finetune.data.clusters import clustered
from mlx_finetune.data.fingerprint import Fingerprint, rank_of
from mlx_finetune.data.near import Near, Remembered

ALIKE = 0.7  # near-duplicates from here on belong together, also where they are kept


@dataclass(frozen=True)
class Decision:
    """By index of the fingerprints. `context`: places of turns that are learned in another conversation.

    `groups`: one label a cluster, the group of that member which was begun first: it stays as newer conversations join, and
    where that member is dropped. Where something new joins two clusters, both have one of their labels: `clusters.label_of`.
    """

    dropped: dict[int, str]  # with the reason
    context: dict[int, tuple[int, ...]]
    groups: list[str]


def decide(prints: Sequence[Fingerprint], shingles: Callable[[int], np.ndarray], threshold: float | None = ALIKE) -> Decision:
    """What is dropped, what is only read, and who belongs together.

    `shingles(i)` gives `shingles_of` the i-th conversation again, for the exact check of a candidate; `threshold` is the least
    Jaccard similarity of near-duplicates: 0 keeps them all (in one group still), None does not look for any. A beginning that
    two share does not make them alike: it is learned once anyhow, so what follows it is compared. What is of the first source
    stays, then what has the most turns, then the newest; a near-duplicate is dropped only if it is near enough to one that
    stays. Fewer are found at a threshold below 0.5.
    """
    assert threshold is None or 0 <= threshold <= 1, threshold
    read = None if threshold is None else Remembered(shingles)
    clusters = clustered(prints, read, min(threshold or ALIKE, ALIKE))
    order = _best_first(prints)
    best = [prints[i] for i in order]  # from here on a conversation is its place in this order
    taught = _Taught(best)
    near = Near(best, lambda i: read(order[i]), threshold) if read and threshold else None
    dropped, context = {}, {}
    for i in range(len(best)):
        reason = taught.reason_to_drop(i)
        if near and not reason and (alike := near.repeated(i)):
            reason = f"near-duplicate of {best[alike[0]].name} ({alike[1]:.2f})"
            clusters.join(order[i], order[alike[0]])  # as a rule they are together already
        if reason:
            dropped[order[i]] = reason
            continue
        if near:
            near.add(i)
        if elsewhere := taught.teach(i):
            context[order[i]] = elsewhere
    return Decision(dropped, context, [clusters.label(i) for i in range(len(prints))])


def _best_first(prints: Sequence[Fingerprint]) -> list[int]:
    order = sorted(range(len(prints)), key=lambda i: prints[i].tie)
    order.sort(key=lambda i: prints[i].time, reverse=True)
    order.sort(key=lambda i: (rank_of(prints[i].source), -int(prints[i].learnable.sum()), -len(prints[i].turns)))
    return order


class _Taught:
    """Which turn, with all before it, is learned where."""

    def __init__(self, prints: Sequence[Fingerprint]) -> None:
        self._prints = prints
        self._ends = np.cumsum([len(one.chain) for one in prints]).tolist()
        chains = np.concatenate([np.zeros(0, np.uint64), *(one.chain for one in prints)])
        distinct, keys = np.unique(chains, return_inverse=True)
        self._keys = keys.ravel().astype(np.int32)
        self._teacher = np.full(len(distinct), -1, np.int32)
        self._holder = np.full(len(distinct), -1, np.int32)  # a kept conversation that has the turn, learned or not
        self._equals: dict[int, list[int]] = {}  # the kept ones

    def _keys_of(self, i: int) -> np.ndarray:
        return self._keys[self._ends[i] - len(self._prints[i].chain) : self._ends[i]]

    def reason_to_drop(self, i: int) -> str:
        """Empty where it has a turn to teach that no kept one has."""
        one, keys = self._prints[i], self._keys_of(i)
        equals = [j for j in self._equals.get(one.exact, ()) if len(self._prints[j].learnable) == len(keys)]
        if equals and not (one.learnable & ~np.any([self._prints[j].learnable for j in equals], axis=0)).any():
            return f"duplicate of {self._prints[equals[0]].name}"
        learnable = keys[one.learnable]
        teachers = self._teacher[learnable] if len(learnable) else self._holder[keys]
        if not len(teachers) or (teachers < 0).any():
            return ""
        return f"beginning of {self._prints[int(teachers[-1])].name}"

    def teach(self, i: int) -> tuple[int, ...]:
        """The i-th is kept; gives back the places of its turns that are learned elsewhere."""
        one, keys = self._prints[i], self._keys_of(i)
        elsewhere = one.learnable & (self._teacher[keys] >= 0)
        self._teacher[keys[one.learnable & ~elsewhere]] = i
        self._holder[keys[self._holder[keys] < 0]] = i
        self._equals.setdefault(one.exact, []).append(i)
        return tuple(one.turns[elsewhere].tolist())
