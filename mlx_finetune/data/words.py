"""Tokens of words that are known already: a text is cut as its tokenizer cuts it, and only words not met before are tokenized.

Most tokenizers cut a text into words by regular expressions, and what becomes of a word depends on nothing around it. The same
cuts are made here, several times faster, and not again where a block of lines was cut before. They are tried on random text when
a tokenizer is loaded, and around every character beyond ASCII when it is first met; where they differ, or a tokenizer does not
cut by expressions, it does the work itself.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from mlx_finetune.data.cuts import END, Cuts

Ids = tuple[np.ndarray, np.ndarray, np.ndarray]  # int32 ids; int64 first characters; int64 ends, exclusive

MOST_KEPT = 2**22  # characters of words, and of blocks; some 20 bytes for each token of them
TRIALS, TRIAL = 64, 400  # texts, of so many signs
SIGNS = [chr(code) for code in range(128)] + list("abzABZ01 9  \n\n\r\t.'s-_") * 8
AROUND = "aZ{0}b {0} {0}{0}\n{0}\n\n {0}1{0}.{0}'{0}s{0}A{0}a  {0}  \r\n{0}\t{0}A-{0}"


class Words:
    """Ids and places of the tokens of texts as `tokenizer` has them; one that takes control tokens for text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        settings = json.loads(tokenizer.to_str())
        added = [token for token in settings["added_tokens"] if not token["special"]]
        self._added = {token["content"] for token in added}
        names = sorted(map(re.escape, self._added), key=len, reverse=True)
        self._name = re.compile(f"({'|'.join(names)})") if names else None
        self._cuts = Cuts(settings)
        self._trusted: dict[str, bool] = {}  # of characters beyond ASCII, whether they are cut here as there
        self._words, self._blocks = _Known(), _Known()
        blanks = any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)  # takes more than its text
        self.fast = self._cuts.fast and not blanks
        self.fast = self.fast and all(map(self._agrees, _trials()))  # which needs it

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Of each text."""
        known, slow = self._look_up(texts)
        others = map(arrays_of, self._tokenizer.encode_batch(slow, add_special_tokens=False) if slow else ())
        return [next(others) if places is None else self._blocks.ids(places) for places in known]

    def count(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has."""
        known, slow = self._look_up(texts)
        others = iter(self._tokenizer.encode_batch_fast(slow, add_special_tokens=False) if slow else ())
        return [len(next(others).ids) if places is None else int(self._blocks.count[places].sum()) for places in known]

    def _look_up(self, texts: Sequence[str]) -> tuple[list[np.ndarray | None], list[str]]:
        """The places of the blocks of each text, and the texts that the tokenizer has to cut itself."""
        cut = [self._blocks_of(text) if self.fast else [] for text in texts]
        for known in (self._words, self._blocks):
            if known.characters > MOST_KEPT:
                known.forget()
        self._learn(block for blocks in cut for block in blocks)
        places = [self._blocks.places(blocks) for blocks in cut]
        found = [own if own.size and own.min() >= 0 else None for own in places]
        return found, [text for text, own in zip(texts, found, strict=True) if own is None]

    def _blocks_of(self, text: str) -> list[str]:
        """Parts that join to one text, but for marks behind some."""
        if not self._name:
            return self._cuts.blocks(text)
        parts = self._name.split(text)  # text and added token in turn
        return [block for i, part in enumerate(parts) for block in ([part] if i % 2 else self._cuts.blocks(part))]

    def _learn(self, blocks: Iterable[str]) -> None:
        """Those not met before, where they can be cut here."""
        new = [block for block in dict.fromkeys(blocks) if block not in self._blocks]
        cut = {block: words for block in new if (words := self._words_of(block)) is not None}
        if not cut:
            return
        places = self._places([*chain.from_iterable(cut.values())])
        sizes = np.array([*map(len, cut.values())], np.int64)
        counts, lengths = (_sums(column[places], sizes) for column in (self._words.count, self._words.length))
        ids, starts, ends = self._words.ids(places)
        before = np.repeat(np.cumsum(lengths) - lengths, counts)
        self._blocks.add(list(cut), counts, lengths, (ids, starts - before, ends - before))

    def _places(self, words: Sequence[str]) -> np.ndarray:
        """int64 [words]; those not met before are learned."""
        places = self._words.places(words)
        if (new := np.flatnonzero(places < 0)).size:
            unknown = list(dict.fromkeys(words[i] for i in new.tolist()))
            encoded = [arrays_of(one) for one in self._tokenizer.encode_batch(unknown, add_special_tokens=False)]
            tokens = tuple(np.concatenate(each) for each in zip(*encoded, strict=True))
            counts = np.array([len(ids) for ids, _, _ in encoded], np.int64)
            self._words.add(unknown, counts, np.array([*map(len, unknown)], np.int64), tokens)
            places[new] = self._words.places([words[i] for i in new.tolist()])
        return places

    def _words_of(self, block: str) -> list[str] | None:
        """None where the tokenizer has to cut it itself."""
        if block in self._added:
            return [block]
        return self._cuts.words(block) if self._is_plain(block) else None

    def _is_plain(self, block: str) -> bool:
        """Whether all of its characters are cut here as there."""
        text = block.removesuffix(END)
        if text.isascii():
            return True
        if not unicodedata.is_normalized("NFC", text):
            return False
        signs = [sign for sign in set(text) if not sign.isascii()]
        for sign in signs:
            if sign not in self._trusted:
                self._trusted[sign] = True  # so that it can be tried
                self._trusted[sign] = self._agrees(AROUND.format(sign))
                if not self._trusted[sign]:
                    self._blocks.forget()  # that of the trial
        return all(map(self._trusted.__getitem__, signs))

    def _agrees(self, text: str) -> bool:
        """Whether a text is tokenized here as there."""
        (own,), (its,) = self.encode([text]), self._tokenizer.encode_batch([text], add_special_tokens=False)
        return all(map(np.array_equal, own, arrays_of(its)))


class _Known:
    """Texts whose tokens are known, each by its place."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """All of them."""
        self.characters = 0
        self._place = _Places()
        self._tokens = _Column(np.int32), _Column(np.int64), _Column(np.int64)  # ids, starts and ends in their text
        self._first, self.count, self.length = _Column(np.int64), _Column(np.int64), _Column(np.int64)  # of each text

    def __contains__(self, text: str) -> bool:
        return text in self._place

    def add(self, texts: Sequence[str], counts: np.ndarray, lengths: np.ndarray, tokens: Sequence[np.ndarray]) -> None:
        """Texts that are not known yet: of each how many `tokens` it has and how many characters, int64 [texts]."""
        self._first.extend(np.cumsum(counts) - counts + len(self._tokens[0]))
        self.count.extend(counts)
        self.length.extend(lengths)
        for column, values in zip(self._tokens, tokens, strict=True):
            column.extend(values)
        self._place |= zip(texts, range(len(self._place), len(self._place) + len(texts)), strict=True)
        self.characters += int(lengths.sum())

    def places(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [texts]; -1 for one that is not known."""
        return np.fromiter(map(self._place.__getitem__, texts), np.int64, len(texts))

    def ids(self, places: np.ndarray) -> Ids:
        """The tokens of the texts at these places, one after the other."""
        counts, lengths = self.count[places], self.length[places]
        tokens = np.repeat(self._first[places] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        starts = np.repeat(np.cumsum(lengths) - lengths, counts)
        ids, first, end = (column[tokens] for column in self._tokens)
        return ids, first + starts, end + starts


def _sums(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """int64 [groups]: the sums of groups of so many neighbours; a group may be empty."""
    ends = np.cumsum(sizes)
    return np.diff(np.append(0, np.cumsum(values))[np.append(0, ends)])


class _Places(dict[str, int]):
    """Where a known text stands; -1 for others."""

    def __missing__(self, text: str) -> int:
        return -1


class _Column:
    """A growing array."""

    def __init__(self, dtype: Any) -> None:
        self._values, self._used = np.zeros(1024, dtype), 0

    def __len__(self) -> int:
        return self._used

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        values: np.ndarray = self._values[places]
        return values

    def extend(self, values: np.ndarray) -> None:
        """Puts them behind the others."""
        end = self._used + len(values)
        if end > len(self._values):
            self._values = np.concatenate([self._values[: self._used], np.zeros(2 * end - self._used, self._values.dtype)])
        self._values[self._used : end] = values
        self._used = end


def arrays_of(encoding: Any) -> Ids:
    """Of an encoding of `tokenizers`."""
    starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    return np.array(encoding.ids, np.int32), starts, ends


def _trials() -> Iterator[str]:
    """Random texts of ASCII, and the same with something else in them."""
    random = np.random.default_rng(0)
    for _ in range(TRIALS):
        text = "".join(random.choice(SIGNS, TRIAL))
        yield text
        yield f"{text}é"
