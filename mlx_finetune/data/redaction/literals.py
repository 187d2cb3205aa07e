"""Where any of a thousand literals stands in a text, in one pass: what `str.find` would need a thousand for."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")
WIDTH = 4  # characters of a literal that are looked up
SLOT_BITS = 18  # a table that stays in a core's cache, and that a thousand literals fill to less than one per cent
MULTIPLIER = np.uint32(2654435761)  # Knuth's: 2**32 divided by the golden ratio, spreads what is alike
SHIFT = np.uint32(32 - SLOT_BITS)
BLOCK = 2**16  # characters at a time: the arrays between stay in the cache too
FOLLOWING = sorted({chr(code).lower() for code in (9, 10, 13, *range(32, 127))})


class Literals(Generic[T]):
    """Literals of three characters or more and what each means; case is ignored.

    Behind one of three there must be a printable character of ASCII, a tab or a line end.

    Each window of four characters is hashed into a table of booleans (Rabin and Karp's idea, all windows at once in numpy);
    where the table says yes, a sorted list decides, and only then does Python compare.
    """

    def __init__(self, meanings: Mapping[str, T]) -> None:
        self._at: dict[bytes, list[tuple[str, T]]] = {}
        for literal, meaning in meanings.items():
            assert len(literal) >= WIDTH - 1, literal
            for head in [literal[:WIDTH]] if len(literal) >= WIDTH else [literal + last for last in FOLLOWING]:
                self._at.setdefault(head.encode("latin-1", errors="replace").lower(), []).append((literal.lower(), meaning))
        self._heads = np.array(sorted(int.from_bytes(head, "little") for head in self._at), dtype=np.uint32)
        self._table = np.zeros(2**SLOT_BITS, dtype=bool)
        self._table[_slots(self._heads)] = True

    def hits(self, texts: Sequence[str]) -> Iterator[tuple[int, int, T]]:
        """Which text, where in it a literal begins and what that means; in order. One pass for all texts: most are small."""
        # One byte a character, so that places in both agree; no literal holds the zero byte between two texts.
        folded = b"\0".join([text.encode("latin-1", errors="replace") for text in texts]).lower()
        starts = np.cumsum([0, *(len(text) + 1 for text in texts)])
        for start in range(0, len(folded) - WIDTH + 1, BLOCK):
            places = self._candidates(folded, start)
            owners = np.searchsorted(starts, places, side="right") - 1
            for owner, place, position in zip(owners.tolist(), places.tolist(), (places - starts[owners]).tolist(), strict=True):
                text = texts[owner]
                for literal, meaning in self._at[folded[place : place + WIDTH]]:
                    if text[position : position + len(literal)].lower() == literal:
                        yield owner, position, meaning

    def _candidates(self, folded: bytes, start: int) -> np.ndarray:
        """Places in one block where the first four characters of a literal stand."""
        block = folded[start : start + BLOCK + WIDTH - 1]
        # The windows from every fourth byte on are aligned: four such passes are faster than one over all of them.
        every = [np.frombuffer(block, "<u4", (len(block) - offset) // WIDTH, offset) for offset in range(WIDTH)]
        likely = [self._table.take(_slots(windows)).nonzero()[0] for windows in every]
        found = np.concatenate([windows[places] for windows, places in zip(every, likely, strict=True)])
        places = np.concatenate([places * WIDTH + offset for offset, places in enumerate(likely)])
        sure = self._heads[np.minimum(np.searchsorted(self._heads, found), len(self._heads) - 1)] == found
        return np.sort(places[sure]) + start


def _slots(windows: np.ndarray) -> np.ndarray:
    return (windows * MULTIPLIER) >> SHIFT
