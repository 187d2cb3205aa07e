"""What two texts have in common, told from a few bytes of each: shingles of words, their MinHash signature, and who is like whom.

One permutation hashing (Li, Owen, Zhang 2012) with optimal densification (Shrivastava 2017): each shingle is hashed once, the
range of the hash is cut into bins, and each bin keeps its least; an empty bin borrows from another one, chosen by its number.
Nothing depends on the platform, nor on Python's own hash.
"""

import re
import zlib
from collections.abc import Iterable
from functools import cache

import numpy as np

BINS = 128  # of a signature
BANDS, ROWS = 32, 4  # at a similarity of 0.7 a pair meets in some band with a chance of 0.9998, at 0.5 of 0.87, at 0.3 of 0.23
MOST_MET = 128  # of those that share bands, how many are looked at: those that share the most
MOST_LIKELY = 32  # of those, how many are named: those whose signatures agree best
WORDS = 5  # in a shingle
LONG_WORD = 24  # characters; a longer word that is not ASCII is taken sign by sign
BLOCK = 2**20  # characters of a text, and words, that are taken at a time
# Scripts that put no blanks between words: Thai and Lao, Burmese, Khmer, CJK with kana and signs, and its wide and narrow forms.
_NO_BLANKS = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff00-\uff9f\U00020000-\U0003ffff])")
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # SplitMix64
_POWERS = np.array([pow(0x9E3779B97F4A7C15, k, 2**64) for k in range(WORDS)], np.uint64)
_NUMBER = np.uint64(0xFFFF)  # the bits of a hash that hold the number of its text instead


def shingles(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of five words within any of the texts, and how many of them the first texts have already.

    A text of fewer words is one shingle; upper and lower case are equal; texts longer than a million characters are cut there.

    Returns:
        uint64 [n], sorted, each once, of which the upper 48 bits say something; int32 [texts]: distinct shingles in the
        texts up to and including each.
    """
    done: list[np.ndarray] = []
    tokens: list[bytes] = []
    lengths: list[int] = []
    numbers: list[int] = []
    count = 0
    for count, text in enumerate(texts, 1):
        for start in range(0, len(text), BLOCK):
            if words := _words(text[start : start + BLOCK]):
                words += [b""] * (WORDS - len(words))
                tokens += words
                lengths.append(len(words))
                numbers.append(min(count - 1, int(_NUMBER)))
        if len(tokens) > BLOCK:
            done.append(_numbered(tokens, lengths, numbers))
            tokens, lengths, numbers = [], [], []
    done.append(_numbered(tokens, lengths, numbers))
    every = _first_of_each(np.concatenate(done))
    new = np.bincount((every & _NUMBER).astype(np.int64), minlength=min(count, int(_NUMBER) + 1))
    seen = np.append(np.cumsum(new), np.full(max(count - len(new), 0), len(every)))
    return every & ~_NUMBER, seen.astype(np.int32)


def _words(text: str) -> list[bytes]:
    text = text.casefold()
    if text.isascii():
        return text.encode().split()
    words: list[bytes] = []
    for word in _NO_BLANKS.sub(r" \1 ", text).split():
        parts = word if len(word) > LONG_WORD and not word.isascii() else (word,)
        words += [part.encode("utf-8", errors="replace") for part in parts]
    return words


def _numbered(tokens: list[bytes], lengths: list[int], numbers: list[int]) -> np.ndarray:
    """The shingles of some texts, each with the number of the first text that has it; texts lie one behind the other."""
    hashes = np.fromiter(map(zlib.crc32, tokens), np.uint64, len(tokens))
    combined = np.zeros(max(len(hashes) - WORDS + 1, 0), np.uint64)
    for k in range(WORDS):
        combined += hashes[k : k + len(combined)] * _POWERS[k]
    text = np.repeat(np.arange(len(lengths)), lengths)
    within = text[: len(combined)] == text[WORDS - 1 :]
    number = np.array(numbers, np.uint64)[text[: len(combined)][within]] if lengths else np.zeros(0, np.uint64)
    return _first_of_each(_mixed(combined[within]) & ~_NUMBER | number)


def _first_of_each(values: np.ndarray) -> np.ndarray:
    values = np.sort(values)
    kept = np.ones(len(values), np.bool_)
    kept[1:] = (values[1:] ^ values[:-1]) > _NUMBER
    return values[kept]


def _mixed(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def signature(values: np.ndarray) -> np.ndarray:
    """uint32 [128] of what `shingles` gives; equal in a bin with a chance of the Jaccard similarity. Zeros for no shingle."""
    if not len(values):
        return np.zeros(BINS, np.uint32)
    edges = np.arange(BINS, dtype=np.uint64) << np.uint64(64 - 7)
    first = np.searchsorted(values, edges)
    filled = first < np.append(first[1:], len(values))
    least = np.zeros(BINS, np.uint64)
    least[filled] = values[first[filled]] - edges[filled]
    lenders = _lenders()
    lender = lenders[np.arange(BINS), filled[lenders].argmax(axis=1)]
    signature: np.ndarray = (least[lender] >> np.uint64(64 - 7 - 32)).astype(np.uint32)
    return signature


@cache
def _lenders() -> np.ndarray:
    """int [128, 128]: for each bin the order in which others are asked; itself first."""
    order = _mixed(np.arange(1, BINS * BINS + 1, dtype=np.uint64)).reshape(BINS, BINS)
    np.fill_diagonal(order, 0)
    return order.argsort(axis=1)


def jaccard(one: np.ndarray, other: np.ndarray, shared: int = 0) -> float:
    """Similarity of two sets of shingles, 0 to 1, leaving out `shared` that both are known to have."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return (common - shared) / max(len(one) + len(other) - common - shared, 1)


def may_reach(threshold: float, estimates: np.ndarray, size: int, sizes: np.ndarray, shared: np.ndarray | int = 0) -> np.ndarray:
    """Whether `jaccard(one, other, shared)` may be `threshold`, if that share of the two signatures agrees; bool [n].

    `size` and `sizes` [n]: shingles of the one and of each other. A truth three standard deviations above is believed.
    """
    less, both = np.minimum(sizes, size), sizes + size
    common = (shared + threshold * (both - shared)) / (1 + threshold)
    least = np.minimum(common / np.maximum(both - common, 1), 1)
    deviation = np.sqrt(least * (1 - least) / np.maximum(np.minimum(less, BINS), 1))
    fits = less - shared >= threshold * (both - less - shared)
    likely: np.ndarray = fits & (estimates >= least - 3 * deviation)
    return likely


def bands_of(signatures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32 [n, bands]: the bucket of each band of each signature [n, 128]; int32 [buckets]: how many share each."""
    halves = signatures.astype(np.uint64).reshape(len(signatures), BANDS, ROWS)
    keys = np.broadcast_to(np.arange(1, BANDS + 1, dtype=np.uint64), halves.shape[:2])
    for row in range(ROWS):
        keys = _mixed(keys + halves[:, :, row])
    _, buckets, sizes = np.unique(keys.ravel(), return_inverse=True, return_counts=True)
    return buckets.reshape(keys.shape).astype(np.int32), sizes.astype(np.int32)


class Neighbours:
    """Those added so far, found by their signatures. A bucket remembers only the first few: one that many share says little."""

    def __init__(self, signatures: np.ndarray, sizes: np.ndarray, bands: tuple[np.ndarray, np.ndarray], most: int) -> None:
        self._signatures, self._sizes, self._buckets = signatures, sizes, bands[0]
        self._room = np.where(bands[1] > 1, np.minimum(bands[1], most), 0)
        self._slots = np.arange(most)
        self._start = np.cumsum(self._room) - self._room
        self._filled = np.zeros(len(self._room), np.int32)
        self._members = np.zeros(int(self._room.sum()) + most, np.int32)

    def add(self, i: int) -> None:
        """From now on the i-th is found."""
        buckets = self._buckets[i]
        buckets = buckets[self._filled[buckets] < self._room[buckets]]
        self._members[self._start[buckets] + self._filled[buckets]] = i
        self._filled[buckets] += 1

    def like(self, i: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Those whose similarity to the i-th may be `threshold`, the most alike first, and what share of the signature agrees."""
        buckets = self._buckets[i]
        buckets = buckets[self._filled[buckets] > 0]
        if not len(buckets):
            return np.zeros(0, np.int64), np.zeros(0)
        places = self._start[buckets][:, None] + self._slots
        every = np.sort(self._members[places[self._slots < self._filled[buckets][:, None]]])
        first = np.append(0, np.flatnonzero(every[1:] != every[:-1]) + 1)
        met = every[first]
        if len(met) > MOST_MET:
            bands = np.diff(first, append=len(every))
            met = met[np.argsort(-bands, kind="stable")[:MOST_MET]]
        estimates = np.count_nonzero(self._signatures[met] == self._signatures[i], axis=1) / BINS
        likely = np.flatnonzero(may_reach(threshold, estimates, int(self._sizes[i]), self._sizes[met]))
        nearest = likely[np.argsort(-estimates[likely], kind="stable")[:MOST_LIKELY]]
        return met[nearest], estimates[nearest]
