"""What two texts have in common, from a few bytes of each: shingles of words and their MinHash signature.

One permutation hashing (Li, Owen, Zhang 2012) with optimal densification (Shrivastava 2017): each shingle is hashed once, the
range of the hash is cut into bins, and each bin keeps its least; an empty bin borrows from another one, chosen by its number.
Nothing depends on the platform, nor on Python's own hash.
"""

import zlib
from collections.abc import Iterable
from functools import cache

import numpy as np

BINS = 128
WORDS = 5  # in a shingle
LONG_WORD = 8  # characters; a longer word that is not ASCII may be a sentence of a script without blanks
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # SplitMix64
_POWERS = np.array([pow(0x9E3779B97F4A7C15, k, 2**64) for k in range(WORDS)], np.uint64)


def shingles(texts: Iterable[str]) -> np.ndarray:
    """Hashes of all runs of five words, in any of the texts; uint64, sorted, each once. Upper and lower case are equal."""
    parts = [_of_text(text) for text in texts]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)


def _of_text(text: str) -> np.ndarray:
    raw = text.casefold().encode("utf-8", errors="replace")
    words = raw.split() if raw.isascii() else _words(raw)
    hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    count = len(hashes) - WORDS + 1
    if count <= 0:  # a short text is one shingle
        return _mixed((hashes * _POWERS[: len(hashes)]).sum(keepdims=True)) if len(hashes) else hashes
    combined = np.zeros(count, np.uint64)
    for k in range(WORDS):
        combined += hashes[k : k + count] * _POWERS[k]
    return _mixed(combined)


def _words(raw: bytes) -> list[bytes]:
    """Words of ASCII as they are, others of more than eight characters as their characters."""
    words: list[bytes] = []
    for word in raw.split():
        if word.isascii() or len(text := word.decode()) <= LONG_WORD:
            words.append(word)
        else:
            words += [sign.encode() for sign in text]
    return words


def _mixed(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))


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
    return (least[lender] >> np.uint64(64 - 7 - 32)).astype(np.uint32)


@cache
def _lenders() -> np.ndarray:
    """int [128, 128]: for each bin the order in which others are asked; itself first."""
    order = _mixed(np.arange(1, BINS * BINS + 1, dtype=np.uint64)).reshape(BINS, BINS)
    np.fill_diagonal(order, 0)
    return order.argsort(axis=1)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Similarity of two sets of shingles, 0 to 1."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / max(len(one) + len(other) - common, 1)
