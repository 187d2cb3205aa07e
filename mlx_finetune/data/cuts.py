"""Where a tokenizer cuts texts into words, by the regular expressions that its settings name, and into blocks of whole words.

A match depends on nothing before it. So where every word ends at a line break in front of some sign, a text can be cut block by
block, and blocks that come again in other texts need not be cut again.
"""

import re
from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import numpy as np
import regex

# The expression of OpenAI's GPT-2; and what cuts as it does behind a cut around each digit, but for up to four digits together:
# their tokens are those of each, whatever stands beside. The most frequent stand in front.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_DIGITS = r" ?\p{L}+|\p{N}{1,4}|'(?:[stmd]|re|ve|ll)| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
DIGIT, DIGITS = r"|\p{N}|", r"|\p{N}{1,4}|"  # the same in the expressions of others
# What classes of Unicode hold of ASCII: Python's own module is three times faster, and does not know them.
ASCII_CLASSES = {"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9", "Nd": "0-9", "Lt": "", "Lm": "", "Lo": "", "M": "", "Mn": ""}
ASCII_CLASSES |= {"P": r"!-#%-*,-/:;?@\[-\]_{}", "S": "$+<=>^`|~"}
BEGINS = (f"{ascii_letters}#*`<>|\"'([{{-$@~=+_", ascii_letters)  # signs in front of which a line break may end a word
NEXT = "A"  # stands for all of them
END = "\udc00"  # behind a block that ends a text; no text holds it
SIGNS = ["\n"] * 40 + [*BEGINS[0], *"  \r\t.,)'\"/-=ab1Z09é…ñ\u00a0\u3000日\u2028"]
TRIALS, TRIAL = 16, 2000  # texts, of so many signs


class Cuts:
    """The cuts of a tokenizer with these `settings`, as tokenizer.json has them. `fast`: whether it cuts by expressions alone."""

    def __init__(self, settings: dict[str, Any]) -> None:
        patterns = _patterns_of(settings)
        self._any = _compiled(patterns or [], regex)
        self._ascii = _compiled([_for_ascii(pattern) for pattern in patterns or []], re, re.ASCII) or self._any
        self.fast = bool(self._any)
        lines = [re.compile(f"(?<=\n)(?=[{re.escape(signs)}])") for signs in BEGINS]
        rows = [re.compile(line.pattern + r"|(?<=\S\n)(?=[0-9])") for line in lines]  # of a table, a log
        texts = _trials()
        self._line = next((line for line in lines if all(self._cuts_alike(line, text) for text in texts)), None)
        self._row = next((row for row in rows if all(self._cuts_alike(row, text) for text in texts)), self._line)

    def blocks(self, text: str) -> list[str]:
        """Parts that join to the text, a mark behind the last: lines, or a few. Each has the same `words` beside any others."""
        parts = self._line.split(text) if self._line else [text]
        parts[-1] += END
        return parts

    def words(self, block: str) -> list[str] | None:
        """Those of a block; None where they do not join to it."""
        last = block.endswith(END)
        text = block[:-1] if last else block + NEXT
        parts = [text] if text.isascii() or not self._row else self._row.split(text)
        words = [word for part in parts[:-1] for word in self._cut(part + NEXT)[:-1]] + self._cut(parts[-1])
        if not last:
            words.pop()
        return words if len("".join(words)) == len(text) - (not last) else None

    def _cut(self, text: str) -> list[str]:
        first, *others = self._ascii if text.isascii() else self._any
        words: list[str] = first.findall(text)
        for pattern in others:
            words = [part for word in words for part in pattern.findall(word)]
        return words

    def _cuts_alike(self, line: re.Pattern[str], text: str) -> bool:
        """Whether the words of blocks are those of the whole text."""
        if not self.fast:
            return False
        parts = line.split(text)
        cut = [self._cut(part + NEXT) for part in parts[:-1]]
        words = [word for part in cut for word in part[:-1]] + self._cut(parts[-1])
        return words == self._cut(text) and all(part[-1] == NEXT for part in cut)


def _trials() -> list[str]:
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(SIGNS, TRIAL)) for _ in range(TRIALS)]
    return [*texts, *("".join(sign for sign in text if sign.isascii()) for text in texts)]


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
    pattern = (step["pattern"].get("Regex") or re.escape(step["pattern"]["String"])).replace(DIGIT, DIGITS)
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
