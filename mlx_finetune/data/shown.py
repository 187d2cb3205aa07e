"""Examples as a person looks at them: the very tokens and weights that the engine is fed, as runs of text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any
from unicodedata import category

import numpy as np

from mlx_finetune.data.batches import Example
from mlx_finetune.data.template import ChatTemplate

KEPT = 60  # tokens of context that stay at each end of what is folded
LEAST_FOLDED = 40  # fewer would hide less than the line that says so takes
HARMLESS = "\n\t\u200c\u200d"  # joiners belong to emoji and to scripts that are written joined
PICTURES = {place: chr(0x2400 + place) for place in range(32)} | {0x7F: "\u2421"}  # Unicode's control pictures


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens that are learned alike; a control token is a run for itself."""

    pieces: tuple[str, ...]  # text of each token
    weight: float  # of each; 0 where it is only read
    special: bool = False

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)

    @property
    def learned(self) -> bool:
        """Whether predicting it counts."""
        return self.weight > 0


@dataclass(frozen=True)
class Folded:
    """Context in the middle of a long stretch of it."""

    runs: tuple[Run, ...]

    @property
    def tokens(self) -> int:
        """How many there are."""
        return sum(len(run.pieces) for run in self.runs)


@dataclass(frozen=True)
class ShownExample:
    """One example decoded."""

    number: int  # its place in the split, from 0
    example: Example
    part: tuple[int, int]  # which of the examples of its conversation, from 1, and of how many
    runs: tuple[Run, ...]

    @property
    def learned(self) -> int:
        """How many of its tokens are learned."""
        return int(np.count_nonzero(self.example.weights))

    @property
    def facts(self) -> list[str]:
        """What a heading says of it behind its number."""
        turns, tokens = self.example.turns, len(self.example.tokens)
        one = len(turns) == 1
        return [
            self.example.source,
            f"conversation {self.example.conversation}" + (" ({} of {})".format(*self.part) if self.part[1] > 1 else ""),
            f"{len(turns)} turn{'s'[one:]} (message{'s'[one:]} {', '.join(map(str, turns))})",
            f"{tokens:,} tokens",
            f"{self.learned:,} learned ({100 * self.learned / tokens:.1f} %)",
            *(["in a context of its own"] if self.example.own_context else []),
            self.exactness,
        ]

    @property
    def exactness(self) -> str:
        """In words, whether its turns are trained after the very tokens with which a server asks for them."""
        exact, turns = self.example.exact_turns, len(self.example.turns)
        return "exactly as served" if exact == turns else f"{exact} of {turns} turns exactly as served"

    def to_json(self) -> dict[str, Any]:
        """Plain values; each run with its text and how many tokens it is."""
        e, runs = self.example, self.runs
        return {
            "example": self.number,
            "source": e.source,
            "conversation": e.conversation,
            "part": list(self.part),
            "turns": list(e.turns),
            "exact_turns": e.exact_turns,
            "tokens": len(e.tokens),
            "learned_tokens": self.learned,
            "own_context": e.own_context,
            "runs": [{"text": r.text, "tokens": len(r.pieces), "weight": r.weight, "special": r.special} for r in runs],
        }


def runs_of(example: Example, template: ChatTemplate) -> list[Run]:
    """The example from its first token to its last; the texts of the runs join to the whole decoded text."""
    special = np.isin(example.tokens, template.special_ids)
    kinds = [(float(w), bool(s), i if s else -1) for i, (w, s) in enumerate(zip(example.weights, special, strict=True))]
    pieces = iter(template.pieces(example.tokens.tolist()))
    return [Run(tuple(next(pieces) for _ in same), weight, special) for (weight, special, _), same in groupby(kinds)]


def folded(runs: Sequence[Run]) -> list[Run | Folded]:
    """The same with long context folded: its first and last `KEPT` tokens stay."""
    found: list[Run | Folded] = []
    for learned, same in groupby(runs, key=lambda run: run.learned):
        stretch = list(same)
        middle = sum(len(run.pieces) for run in stretch) - 2 * KEPT
        if learned or middle < LEAST_FOLDED:
            found += stretch
            continue
        head, rest = _split(stretch, KEPT)
        hidden, tail = _split(rest, middle)
        found += [*head, Folded(tuple(hidden)), *tail]
    return found


def _split(runs: Sequence[Run], count: int) -> tuple[list[Run], list[Run]]:
    """The first `count` tokens and the others."""
    first: list[Run] = []
    for i, run in enumerate(runs):
        if count < len(run.pieces):
            cut = [replace(run, pieces=run.pieces[:count])] if count else []
            return [*first, *cut], [replace(run, pieces=run.pieces[count:]), *runs[i + 1 :]]
        first.append(run)
        count -= len(run.pieces)
    return first, []


def visible(text: str) -> str:
    """As `text`, but what would move a terminal's cursor or turn the direction of text shows as a sign or as its number."""
    return "".join(sign if sign.isprintable() or sign in HARMLESS else _name(sign) for sign in text)


def _name(sign: str) -> str:
    return PICTURES.get(ord(sign)) or (sign if category(sign) == "Zs" else f"<U+{ord(sign):04X}>")
