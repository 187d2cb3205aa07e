"""Tokenizing without doing the same work twice: texts are cut at control tokens, and a long part that comes again is known.

Most logs begin with a prompt that another one has; and the parts of one chat are tokenized side by side on all cores.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mlx_finetune.data.words import Ids, Words, arrays_of

LONG = 1000  # characters from which a part is kept
MOST_KEPT = 256  # long parts; some megabytes
MOST_COUNTS = 2**14
SAMPLE = " one\ntwo  three\n\n", "", "four's\n", "'\"x ", "\nfive 5 "


class Segments:
    """`special` finds control tokens in a text, `plain` takes them for text; `control`: ids and added tokens by id."""

    def __init__(self, special: Any, plain: Any, control: Mapping[int, Any]) -> None:
        self._special, self._words = special, Words(plain)
        self._controls = {
            t.content: (np.array([i], np.int32), np.array([0]), np.array([len(t.content)])) for i, t in control.items()
        }
        self._known: dict[str, Ids] = {}
        self._chat: dict[str, Ids] = {}  # parts of the chat that was last looked at
        self._counts: dict[str, int] = {}
        blanks = any(token.lstrip or token.rstrip or token.single_word for token in control.values())  # takes more than its text
        names = sorted(self._controls, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, names))})") if names and not blanks else None
        if self._cut and not self._joins(names):
            self._cut = None  # what stands before or behind a control token changes the part beside it

    def _joins(self, names: Sequence[str]) -> bool:
        texts = [names[0].join(SAMPLE), "".join(part + name for part, name in zip(SAMPLE, names, strict=False))]
        return all(self.encode(text)[0].tolist() == self._special.encode(text, add_special_tokens=False).ids for text in texts)

    def encode(self, text: str) -> Ids:
        """As `special` tokenizes the text, with the characters that each token stands for."""
        if self._cut is None:
            return arrays_of(self._special.encode(text, add_special_tokens=False))
        return self._join(parts := self._cut.split(text), self._encoded(parts[::2]))

    def look_ahead(self, text: str) -> Ids:
        """As `encode`, of a chat; its parts, which stand in its windows too, are known until the next one."""
        if self._cut is None:
            return self.encode(text)
        parts = self._cut.split(text)
        self._chat = {}
        self._chat = self._encoded(parts[::2])
        return self._join(parts, self._chat)

    def _join(self, parts: Sequence[str], encoded: Mapping[str, Ids]) -> Ids:
        """The tokens of `parts`, which are text and control token in turn."""
        pieces: list[Ids] = []
        lengths: list[int] = []
        for i, part in enumerate(parts):
            if part:
                pieces.append(self._controls[part] if i % 2 else encoded[part])
                lengths.append(len(part))
        if not pieces:
            return arrays_of(self._special.encode("", add_special_tokens=False))
        places = np.cumsum([0, *lengths[:-1]])
        ids, starts, ends = (np.concatenate(each) for each in zip(*pieces, strict=True))
        before = np.repeat(places, [len(own) for own, _, _ in pieces])
        return ids, starts + before, ends + before

    def _encoded(self, parts: Iterable[str]) -> dict[str, Ids]:
        found = {part: self._chat.get(part) or self._known.get(part) for part in parts if part}
        new = [part for part, known in found.items() if known is None]
        arrays = dict(zip(new, self._words.encode(new), strict=True)) if new else {}
        self._known |= {part: each for part, each in arrays.items() if len(part) >= LONG}
        while len(self._known) > MOST_KEPT:
            del self._known[next(iter(self._known))]
        return {part: known if known is not None else arrays[part] for part, known in found.items()}

    def count(self, texts: Sequence[str]) -> int:
        """How many tokens `plain` makes of the texts, together; a few more where paragraphs would share one."""
        parts = [part for text in texts for part in _paragraphs(text)]
        if len(self._counts) + len(parts) > MOST_COUNTS:
            self._counts = {part: self._counts[part] for part in parts if part in self._counts}
        new = [part for part in dict.fromkeys(parts) if part not in self._counts]
        self._counts |= zip(new, self._words.count(new), strict=True)
        return sum(self._counts[part] for part in parts)


def _paragraphs(text: str) -> list[str]:
    """Each with the empty line before it, on both sides of which few tokens stand."""
    first, *others = text.split("\n\n")
    return [first, *("\n\n" + part for part in others)]


def moved(ids: Ids, by: int) -> Ids:
    """The same tokens, so many characters further on."""
    return ids[0], ids[1] + by, ids[2] + by
