"""Tokens of words that are known already: a text is cut as its tokenizer cuts it, and only words not met before are tokenized.

Most tokenizers cut a text into words by regular expressions, and what becomes of a word depends on nothing around it. The same
cuts are made here, several times faster. They are tried on random text when a tokenizer is loaded, and around every character
beyond ASCII when it is first met; where they differ, or a tokenizer does not cut by expressions, it does the work itself.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import regex

Ids = tuple[np.ndarray, np.ndarray, np.ndarray]  # int32 ids; int64 first characters; int64 ends, exclusive

# The expression of OpenAI's GPT-2, and one that cuts as it does behind a cut around each digit.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# What classes of Unicode hold of ASCII: Python's own module is three times faster, and does not know them.
ASCII_CLASSES = {"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9", "Nd": "0-9", "Lt": "", "Lm": "", "Lo": "", "M": "", "Mn": ""}
ASCII_CLASSES |= {"P": r"!-#%-*,-/:;?@\[-\]_{}", "S": "$+<=>^`|~"}
MOST_KEPT = 2**18  # words, of 16 characters each
TRIALS, TRIAL = 64, 400  # texts, of so many signs
SIGNS = [chr(code) for code in range(128)] + list("abzABZ01 9  \n\n\r\t.'s-_") * 8
AROUND = "aZ{0}b {0} {0}{0}\n{0}\n\n {0}1{0}.{0}'{0}s{0}A{0}a  {0}  \r\n{0}\t{0}A-{0}"


class Words:
    """Ids and places of the tokens of texts as `tokenizer` has them; one that takes control tokens for text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        settings = json.loads(tokenizer.to_str())
        added = [token for token in settings["added_tokens"] if not token["special"]]
        names = sorted((re.escape(token["content"]) for token in added), key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(names)})") if names else None
        blanks = any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)  # takes more than its text
        patterns = None if blanks else _patterns_of(settings)
        self._any = _compiled(patterns or [], regex)
        self._ascii = _compiled([_for_ascii(pattern) for pattern in patterns or []], re, re.ASCII) or self._any
        self._trusted: dict[str, bool] = {}  # of characters beyond ASCII, whether they are cut here as there
        self._forget()
        self.fast = bool(self._any)
        self.fast = self.fast and all(map(self._agrees, _trials()))  # which needs it

    def _forget(self) -> None:
        self._known = _Places()
        self._characters = 0
        self._tokens = [_Column(np.int32), _Column(np.int64), _Column(np.int64)]  # ids, starts and ends in their word
        self._first, self._count, self._length = _Column(np.int64), _Column(np.int64), _Column(np.int64)  # of each word

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Of each text."""
        known, slow = self._look_up(texts)
        others = map(arrays_of, self._tokenizer.encode_batch(slow, add_special_tokens=False) if slow else ())
        return [next(others) if places is None else self._ids(places) for places in known]

    def count(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has."""
        known, slow = self._look_up(texts)
        others = iter(self._tokenizer.encode_batch_fast(slow, add_special_tokens=False) if slow else ())
        return [len(next(others).ids) if places is None else int(self._count[places].sum()) for places in known]

    def _look_up(self, texts: Sequence[str]) -> tuple[list[np.ndarray | None], list[str]]:
        """The places of the words of each text, and the texts that the tokenizer has to cut itself."""
        cut = [self._words(text) for text in texts]
        if len(self._known) > MOST_KEPT or self._characters > 16 * MOST_KEPT:
            self._forget()
        known = [None if words is None else self._places(words) for words in cut]
        return known, [text for text, words in zip(texts, cut, strict=True) if words is None]

    def _words(self, text: str) -> list[str] | None:
        """Those of one text, which join to it; None where the tokenizer has to cut it itself."""
        if not self.fast or not self._is_plain(text):
            return None
        patterns = self._ascii if text.isascii() else self._any
        if not self._cut:
            words = _split(text, patterns)
        else:
            parts = self._cut.split(text)  # text and added token in turn
            words = [word for i, part in enumerate(parts) for word in ([part] if i % 2 else _split(part, patterns))]
        return words if sum(map(len, words)) == len(text) else None

    def _is_plain(self, text: str) -> bool:
        """Whether all of its characters are cut here as there."""
        if text.isascii():
            return True
        if not unicodedata.is_normalized("NFC", text):
            return False
        signs = [sign for sign in set(text) if not sign.isascii()]
        for sign in signs:
            if sign not in self._trusted:
                self._trusted[sign] = True  # so that it can be tried
                self._trusted[sign] = self._agrees(AROUND.format(sign))
        return all(map(self._trusted.__getitem__, signs))

    def _agrees(self, text: str) -> bool:
        """Whether a text is tokenized here as there."""
        (own,), (its,) = self.encode([text]), self._tokenizer.encode_batch([text], add_special_tokens=False)
        return all(map(np.array_equal, own, arrays_of(its)))

    def _learn(self, words: Sequence[str]) -> None:
        encoded = [arrays_of(one) for one in self._tokenizer.encode_batch(words, add_special_tokens=False)]
        counts = np.array([len(ids) for ids, _, _ in encoded], np.int64)
        self._first.extend(np.cumsum(counts) - counts + len(self._tokens[0]))
        self._count.extend(counts)
        self._length.extend(np.array([*map(len, words)], np.int64))
        for column, arrays in zip(self._tokens, zip(*encoded, strict=True), strict=True):
            column.extend(np.concatenate(arrays))
        self._known |= {word: place for place, word in enumerate(words, len(self._known))}
        self._characters += sum(map(len, words))

    def _places(self, words: Sequence[str]) -> np.ndarray:
        """int64 [words]; those not met before are learned."""
        places = np.fromiter(map(self._known.__getitem__, words), np.int64, len(words))
        new = np.flatnonzero(places < 0).tolist()
        if new:
            self._learn(list(dict.fromkeys(words[i] for i in new)))
            places[new] = [self._known[words[i]] for i in new]
        return places

    def _ids(self, places: np.ndarray) -> Ids:
        counts, lengths = self._count[places], self._length[places]
        before = np.cumsum(counts) - counts
        tokens = np.repeat(self._first[places] - before, counts) + np.arange(counts.sum())
        starts = np.repeat(np.cumsum(lengths) - lengths, counts)
        ids, first, end = (column[tokens] for column in self._tokens)
        return ids, first + starts, end + starts


class _Places(dict[str, int]):
    """Where a known word stands; -1 for others."""

    def __missing__(self, word: str) -> int:
        return -1


class _Column:
    """A growing array."""

    def __init__(self, dtype: Any) -> None:
        self._values, self._used = np.zeros(1024, dtype), 0

    def __len__(self) -> int:
        return self._used

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        return self._values[places]

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


def _split(text: str, patterns: Sequence[Any]) -> list[str]:
    words: list[str] = patterns[0].findall(text)
    for pattern in patterns[1:]:
        words = [part for word in words for part in pattern.findall(word)]
    return words


def _patterns_of(settings: dict[str, Any]) -> list[str] | None:
    """The expressions by which a tokenizer cuts, one after the other; None where it does not cut by expressions alone."""
    if (settings["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        return None
    whole = settings["pre_tokenizer"] or {"type": "none"}
    steps = whole["pretokenizers"] if whole["type"] == "Sequence" else [whole]
    if [step["type"] for step in steps] == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return [GPT2_DIGITS] if steps[1]["use_regex"] and not steps[1]["add_prefix_space"] else None
    patterns = []
    for step in steps:
        pattern = _pattern_of(step)
        if pattern is None:
            return None
        patterns += [pattern] if pattern else []
    return patterns or None


def _pattern_of(step: dict[str, Any]) -> str | None:
    """Of one step; empty where it cuts nothing, None where it does something else."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return GPT2 if step["use_regex"] else ""
    if step["type"] == "Digits":
        return r"\p{N}|\P{N}+" if step["individual_digits"] else r"\p{N}+|\P{N}+"
    if step["type"] != "Split" or (step["behavior"], step["invert"]) not in (("Isolated", False), ("Removed", True)):
        return None
    pattern = step["pattern"].get("Regex") or re.escape(step["pattern"]["String"])
    return pattern if step["invert"] else rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def _compiled(patterns: Sequence[str | None], module: Any, flags: int = 0) -> list[Any]:
    """All of them; none where one cannot be said in the module's language or holds a group."""
    try:
        compiled = [module.compile(pattern, flags) for pattern in patterns if pattern is not None]
    except module.error:
        return []
    return compiled if len(compiled) == len(patterns) and not any(one.groups for one in compiled) else []


def _for_ascii(pattern: str) -> str | None:
    """The expression without classes of Unicode, which cuts ASCII in the same way; None where it has others than are known."""
    parts, inside = [], False
    for part in re.findall(r"\\[pP]\{\w+\}|\\.|[\s\S]", pattern):
        if part.startswith("\\p"):
            ranges = ASCII_CLASSES.get(part[3:-1])
            if ranges is None:
                return None
            parts.append(ranges if inside else f"[{ranges}]" if ranges else "(?!)")
        elif part.startswith("\\P"):
            ranges = ASCII_CLASSES.get(part[3:-1])
            if inside or not ranges:
                return None
            parts.append(f"[^{ranges}]")
        else:
            inside = part == "[" or (inside and part != "]")
            parts.append(part)
    return "".join(parts)


def _trials() -> Iterator[str]:
    """Random texts of ASCII, and the same with something else in them."""
    random = np.random.default_rng(0)
    for _ in range(TRIALS):
        text = "".join(random.choice(SIGNS, TRIAL))
        yield text
        yield f"{text}é"
