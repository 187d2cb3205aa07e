"""The text of an answer while it is written: whole characters only, no control tokens, nothing that may yet be a stop string."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from mlx_finetune.data.token_text import INCOMPLETE, MORE

Decode = Callable[[list[int]], str]
MOST = 64  # tokens that may wait: only bytes that are no characters would be more


class Pieces:
    """Text of tokens as they come; the pieces join to the decoded text of all of them."""

    def __init__(self, decode: Decode, hidden: Collection[int]) -> None:
        """`hidden`: tokens that are no text."""
        self._decode, self._hidden = decode, frozenset(hidden)
        self._ids: list[int] = []  # what is decoded: the last token before the text that waits, since decoders look back
        self._given = 0  # characters of it that were given away

    def add(self, token: int) -> str:
        """What can be told of the text with one more token."""
        if token in self._hidden:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = len(text) - min(len(text) - len(text.rstrip(INCOMPLETE)), MORE)  # the rest may yet become a character
        piece, self._given = text[self._given : whole], max(self._given, whole)
        if whole == len(text) or len(self._ids) > MOST:
            piece += text[self._given :]
            self._ids = self._ids[-1:]
            self._given = len(self._decode(self._ids))
        return piece

    def rest(self) -> str:
        """What is left once no more tokens come."""
        text = self._decode(self._ids)[self._given :] if self._ids else ""
        self._ids, self._given = [], 0
        return text


@dataclass
class Held:
    """Keeps back the end of a text while it may be the beginning of one of `marks`; ends at the first of them."""

    marks: Sequence[str]
    found: str = ""  # the mark that was met
    _waiting: str = ""

    def add(self, piece: str) -> str:
        """What may be given away; nothing any more once a mark was met: what follows it is in `rest`."""
        self._waiting += piece
        if self.found:
            return ""
        places = [(place, -len(mark), mark) for mark in self.marks if (place := self._waiting.find(mark)) >= 0]
        if places:
            place, _, self.found = min(places)
        else:
            place = len(self._waiting) - max((_overlap(self._waiting, mark) for mark in self.marks), default=0)
        given, self._waiting = self._waiting[:place], self._waiting[place:]
        return given

    def rest(self) -> str:
        """What was kept back, from the mark on where one was met."""
        text, self._waiting = self._waiting, ""
        return text


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` begin `mark`."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)
