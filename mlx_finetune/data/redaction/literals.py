"""Where any of a thousand literals stands in a text, in one pass: what `str.find` would need a thousand for."""

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")
WIDTH = 4  # characters of a literal that are looked up
SLOT_BITS = 18  # a table that stays in a core's cache, and that a thousand literals fill to less than one per cent
MULTIPLIER = np.uint32(2654435761)  # Knuth's: 2**32 divided by the golden ratio, spreads what is alike
SHIFT = np.uint32(32 - SLOT_BITS)
BLOCK = 2**16  # characters at a time: the arrays between stay in the cache too
PRINTABLE = sorted({chr(code).lower() for code in range(32, 127)})


class Literals(Generic[T]):
    """Literals of three characters or more (with three, a printable one of ASCII must follow) and what each means; case is ignored.

    Each window of four characters is hashed into a table of booleans (Rabin and Karp's idea, all windows at once in numpy);
    only where the table says yes does Python compare.
    """

    def __init__(self, meanings: Mapping[str, T]) -> None:
        self._at: dict[bytes, list[tuple[str, T]]] = {}
        for literal, meaning in meanings.items():
            assert len(literal) >= WIDTH - 1, literal
            for head in [literal[:WIDTH]] if len(literal) >= WIDTH else [literal + last for last in PRINTABLE]:
                self._at.setdefault(_folded(head), []).append((literal.lower(), meaning))
        self._table = np.zeros(2**SLOT_BITS, dtype=bool)
        for head in self._at:
            self._table[_slots(head, 0, WIDTH)] = True

    def hits(self, text: str) -> Iterator[tuple[int, T]]:
        """Where a literal begins and what it means, from left to right."""
        folded = _folded(text)
        for start in range(0, len(folded) - WIDTH + 1, BLOCK):
            slots = _slots(folded, start, min(start + BLOCK + WIDTH - 1, len(folded)))
            for position in (np.flatnonzero(self._table.take(slots)) + start).tolist():
                for literal, meaning in self._at.get(folded[position : position + WIDTH], ()):
                    if text[position : position + len(literal)].lower() == literal:
                        yield position, meaning


def _folded(text: str) -> bytes:
    """One byte a character, so that places in both agree; small letters."""
    return text.encode("latin-1", errors="replace").lower()


def _slots(folded: bytes, start: int, end: int) -> np.ndarray:
    """The slot of each window of four characters between `start` and `end`."""
    windows = np.ndarray((end - start - WIDTH + 1,), dtype="<u4", buffer=folded, offset=start, strides=(1,))
    return (windows * MULTIPLIER) >> SHIFT
