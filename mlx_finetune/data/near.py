"""Near-duplicates among many: candidates by their signatures, each checked on all its shingles."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mlx_finetune.data.fingerprint import Fingerprint
from mlx_finetune.data.minhash import BINS, Neighbours, bands_of, jaccard, may_reach

FEW_SHINGLES = 10  # with fewer of its own a conversation is a duplicate only of an equal one
MOST_KEPT = 64  # conversations that one bucket remembers
MOST_COMPARED = 8  # exact comparisons of one conversation with others
REMEMBERED = 2**22  # shingles in memory, 32 MB


class Remembered:
    """Gives the shingles of the i-th conversation, and reads them again only where they were not asked for lately."""

    def __init__(self, read: Callable[[int], np.ndarray]) -> None:
        self._read, self._held = read, 0
        self._sets: OrderedDict[int, np.ndarray] = OrderedDict()

    def __call__(self, i: int) -> np.ndarray:
        """uint64, sorted, each once."""
        if i not in self._sets:
            self._sets[i] = self._read(i)
            self._held += len(self._sets[i])
        self._sets.move_to_end(i)
        while self._held > REMEMBERED and len(self._sets) > 1:
            self._held -= len(self._sets.popitem(last=False)[1])
        return self._sets[i]


class Near:
    """Those added so far, to find which of them another is like. Who is added later changes no answer given before."""

    def __init__(self, prints: Sequence[Fingerprint], read: Callable[[int], np.ndarray], threshold: float) -> None:
        """`read(i)`: the shingles of the i-th of `prints`; `threshold`: the least Jaccard similarity."""
        assert 0 < threshold <= 1, threshold
        self._prints, self._read, self._threshold = prints, read, threshold
        signatures = np.array([one.signature for one in prints], np.uint32).reshape(-1, BINS)
        self._sizes = np.array([one.shingles for one in prints], np.int64)
        self._found = Neighbours(signatures, self._sizes, bands_of(signatures), MOST_KEPT)

    def add(self, i: int) -> None:
        """From now on the i-th is found."""
        if self._sizes[i] >= FEW_SHINGLES:
            self._found.add(i)

    def like(self, i: int, known: Callable[[int], bool]) -> Iterator[int]:
        """Those that the i-th is like in all its words, the likeliest first, but for those that are `known` by then."""
        if self._sizes[i] < FEW_SHINGLES:
            return
        compared = 0
        for j in self._found.like(i, self._threshold)[0].tolist():
            if compared == MOST_COMPARED:
                return
            if not known(j):
                compared += 1
                if self._similarity(i, j) >= self._threshold:
                    yield j

    def repeated(self, i: int) -> tuple[int, float] | None:
        """One that the i-th is like in all that follows the turns with which both begin, and how much; None if there is none."""
        if self._sizes[i] < FEW_SHINGLES:
            return None
        likely, estimates = self._found.like(i, self._threshold)
        shared = np.array([self._shared(i, j) for j in likely.tolist()], np.int64)
        if shared.any():
            size = self._prints[i].shingles
            fits = may_reach(self._threshold, estimates, size, self._sizes[likely], shared) & (size - shared >= FEW_SHINGLES)
            likely, shared = likely[fits], shared[fits]
        for j, common in zip(likely[:MOST_COMPARED].tolist(), shared.tolist(), strict=False):
            similarity = self._similarity(i, j, common)
            if similarity >= self._threshold:
                return j, similarity
        return None

    def _similarity(self, i: int, j: int, shared: int = 0) -> float:
        return jaccard(self._read(i), self._read(j), shared)

    def _shared(self, i: int, j: int) -> int:
        """How many shingles the turns have that both begin with."""
        one, other = self._prints[i], self._prints[j]
        turns = min(len(one.chain), len(other.chain))
        if not turns or one.chain[0] != other.chain[0]:
            return 0
        differ = one.chain[:turns] != other.chain[:turns]
        common = int(differ.argmax()) or turns  # the first is equal
        return int(one.seen[common - 1])
