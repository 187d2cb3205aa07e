"""Examples as a person looks at them: the very tokens and weights that the engine is fed, as runs of text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np

from mlx_finetune.data.batches import Example
from mlx_finetune.data.template import ChatTemplate

KEPT = 60  # tokens of context that stay at each end of what is folded
LEAST_FOLDED = 40  # fewer would hide less than the line that says so takes
ROWS_AT_ONCE = 500
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
    """One example decoded. `own_context`: whether its turn has one of its own, None where that cannot be told."""

    number: int  # its place in the split, from 0
    example: Example
    own_context: bool | None
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
            f"conversation {self.example.conversation}",
            f"{len(turns)} turn{'s'[one:]} (message{'s'[one:]} {', '.join(map(str, turns))})",
            f"{tokens:,} tokens",
            f"{self.learned:,} learned ({100 * self.learned / tokens:.1f} %)",
            *(["in a context of its own"] if self.own_context else []),
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values; each run with its text and how many tokens it is."""
        e, runs = self.example, self.runs
        return {
            "example": self.number,
            "source": e.source,
            "conversation": e.conversation,
            "turns": list(e.turns),
            "tokens": len(e.tokens),
            "learned_tokens": self.learned,
            "own_context": self.own_context,
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


@dataclass(frozen=True)
class Overview:
    """All examples of one split, in order, without their text."""

    sources: tuple[str, ...]
    conversations: tuple[str, ...]  # ids
    turns: np.ndarray  # int64 [N], how many are learned
    tokens: np.ndarray  # int64 [N]
    learned: np.ndarray  # int64 [N], tokens whose weight is not 0

    def __len__(self) -> int:
        return len(self.sources)


def overview(path: Path) -> Overview:
    """Counts what stands in the Arrow file of a split, a few hundred examples at a time."""
    from datasets import Dataset as ArrowDataset

    rows = ArrowDataset.from_file(str(path)).with_format("arrow")
    sources, conversations = list[str](), list[str]()
    counts: list[tuple[int, int, int]] = []
    for batch in rows.iter(batch_size=ROWS_AT_ONCE):
        sources += batch["source"].to_pylist()
        conversations += batch["conversation"].to_pylist()
        turns = (len(turns) for turns in batch["turns"].to_pylist())
        counts += zip(turns, batch["length"].to_pylist(), _learned(batch["weights"]), strict=True)
    columns = np.array(counts, np.int64).reshape(-1, 3).T
    return Overview(tuple(sources), tuple(conversations), *columns)


def _learned(weights: object) -> Iterator[int]:
    """Of each example in a column of weights, how many are not 0."""
    for each in weights:  # type: ignore[attr-defined]
        yield int(np.count_nonzero(each.values.to_numpy()))
