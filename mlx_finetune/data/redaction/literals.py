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
    where the table says yes, a sorted list decides, and only then does Python compare.
    """

    def __init__(self, meanings: Mapping[str, T]) -> None:
        self._at: dict[bytes, list[tuple[str, T]]] = {}
        for literal, meaning in meanings.items():
            assert len(literal) >= WIDTH - 1, literal
            for head in [literal[:WIDTH]] if len(literal) >= WIDTH else [literal + last for last in PRINTABLE]:
                self._at.setdefault(head.encode("latin-1", errors="replace").lower(), []).append((literal.lower(), meaning))
        self._heads = np.array(sorted(int.from_bytes(head, "little") for head in self._at), dtype=np.uint32)
        self._table = np.zeros(2**SLOT_BITS, dtype=bool)
        self._table[_slots(self._heads)] = True

    def hits(self, text: str) -> Iterator[tuple[int, T]]:
        """Where a literal begins and what it means, from left to right."""
        folded = text.encode("latin-1", errors="replace").lower()  # one byte a character, so that places in both agree
        for start in range(0, len(folded) - WIDTH + 1, BLOCK):
            for position in self._candidates(folded, start):
                for literal, meaning in self._at[folded[position : position + WIDTH]]:
                    if text[position : position + len(literal)].lower() == literal:
                        yield position, meaning

    def _candidates(self, folded: bytes, start: int) -> list[int]:
        """Places in one block where the first four characters of a literal stand."""
        count = min(BLOCK, len(folded) - start - WIDTH + 1)
        windows = np.ndarray((count,), dtype="<u4", buffer=folded, offset=start, strides=(1,))
        likely = np.flatnonzero(self._table.take(_slots(windows)))
        found = windows[likely]
        sure = self._heads[np.minimum(np.searchsorted(self._heads, found), len(self._heads) - 1)] == found
        return (likely[sure] + start).tolist()


def _slots(windows: np.ndarray) -> np.ndarray:
    return (windows * MULTIPLIER) >> SHIFT
