"""Held-out losses token by token, and their means by source, by kind of token and by kind of turn, base beside tuned."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_finetune.data.batches import Batch
from mlx_finetune.engines import Engine
from mlx_finetune.evaluation.bootstrap import Difference, compare_means, sums_of
from mlx_finetune.evaluation.token_kinds import AFTER, KINDS, Told
from mlx_finetune.training.held_out import HeldOut, judged_by


@dataclass(frozen=True)
class Tokens:
    """Every learned token of a split, in the order in which the batches have them; all arrays are of one length."""

    sources: np.ndarray  # str
    conversations: np.ndarray  # int64
    kinds: np.ndarray  # int8, of KINDS
    after: np.ndarray  # int8, of AFTER
    weights: np.ndarray  # float64

    @property
    def judged(self) -> np.ndarray:
        """bool: those that make up the loss."""
        return np.isin(self.sources, judged_by(set(self.sources.tolist())))


@dataclass(frozen=True)
class Row:
    """One line of the table, in nats a token; `low` and `high` bound the difference (see bootstrap.py)."""

    group: str  # all, source, kind, turn
    name: str
    tokens: int
    conversations: int
    base: float | None
    tuned: float | None
    difference: float | None
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def tokens_of(told: Sequence[Told], groups: Mapping[str, Sequence[Sequence[int]]]) -> Tokens:
    """Those of the examples in `groups`: of each source its batches, as numbers of examples."""
    numbers: dict[str, int] = {}
    columns: list[list[np.ndarray]] = [[], [], [], [], []]
    for one in (told[i] for batches in groups.values() for batch in batches for i in batch):
        learned = np.flatnonzero(one.example.weights > 0)
        number = numbers.setdefault(one.example.conversation, len(numbers))
        whole = (one.example.source, number, one.kinds, one.after, one.example.weights)
        for column, values in zip(columns, whole, strict=True):
            column.append(values[learned] if isinstance(values, np.ndarray) else np.full(len(learned), values))
    sources, conversations, kinds, after, weights = map(np.concatenate, columns)
    return Tokens(sources, conversations, kinds, after, weights.astype(np.float64))


def measure(engine: Engine, batches: Mapping[str, Sequence[Batch]], advance: Callable[[int, int], None]) -> np.ndarray:
    """float64 [tokens]: the loss of each learned token, in the order of the batches."""
    every, found = [batch for each in batches.values() for batch in each], []
    for number, batch in enumerate(every, 1):
        found.append(engine.losses(batch).astype(np.float64))
        advance(number, len(every))
    return np.concatenate(found)


def held_out(tokens: Tokens, losses: np.ndarray) -> HeldOut:
    """As the run itself says it: weighted by token."""
    sources = sorted(set(tokens.sources.tolist()))
    of = {source: tokens.sources == source for source in sources}
    by_source = {source: _mean(losses[of[source]], tokens.weights[of[source]]) for source in sources}
    judged = tokens.judged
    counts = {source: int(of[source].sum()) for source in sources}
    return HeldOut(_mean(losses[judged], tokens.weights[judged]), by_source, int(judged.sum()), counts)


def _mean(losses: np.ndarray, weights: np.ndarray) -> float:
    return float(losses @ weights / weights.sum())


def rows_of(tokens: Tokens, base: np.ndarray, tuned: np.ndarray | None, seed: int) -> list[Row]:
    """All tokens, those of each source, of each kind, of each kind of turn; but for sources, of what makes up the loss alone.

    `tuned`: None where only one model was measured.
    """
    return [_row(group, name, chosen, tokens, base, tuned, seed) for group, name, chosen in _groups(tokens) if chosen.any()]


def _groups(tokens: Tokens) -> Iterator[tuple[str, str, np.ndarray]]:
    judged = tokens.judged
    yield "all", "all", judged
    for source in sorted(set(tokens.sources.tolist())):
        yield "source", source, tokens.sources == source
    for number, name in enumerate(KINDS):
        yield "kind", name, judged & (tokens.kinds == number)
    for number, name in enumerate(AFTER):
        yield "turn", name, judged & (tokens.after == number)


def _row(group: str, name: str, chosen: np.ndarray, tokens: Tokens, base: np.ndarray, tuned: np.ndarray | None, seed: int) -> Row:
    weights, conversations = tokens.weights[chosen], tokens.conversations[chosen]
    if tuned is None:
        found = Difference(_mean(base[chosen], weights), None)
    else:
        before, after = (losses[chosen] * weights for losses in (base, tuned))
        found = compare_means(sums_of(conversations, before, after, weights, weights), seed)
    return Row(group, name, int(chosen.sum()), len(np.unique(conversations)), **asdict(found))
