"""How much of OpenAssistant: a share of the learned tokens, counted as they are, never an estimate by rows."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_finetune.data.entries import Entry
from mlx_finetune.data.sources.openassistant import SOURCE as OPENASSISTANT
from mlx_finetune.data.split import place

MOST_MISSES = 8  # trees in all that are encoded in vain, to fill what is left of the share
FULL = "the share of OpenAssistant is full"
TOO_MUCH = "would exceed the share of OpenAssistant"


class Mixture:
    """Takes everything else, then trees one by one as long as they keep to the share.

    The order is that of the groups' places, so the trees that few conversations of one's own allow are among those that more
    of them allow (but for the last few, which fill up what is left).
    """

    def __init__(self, share: float, trees: Sequence[Entry], alone: bool) -> None:
        """`share`: the most that `trees` may make up of the learned tokens; where they are `alone`, all are taken."""
        self._share = 1.0 if alone else share
        self._asked = share
        self._trees = sorted(trees, key=lambda entry: (place(entry.group), entry.name, str(entry.path), entry.number))
        self._misses = 0
        self.learned: Counter[str] = Counter()  # tokens by source
        self.left_out: Counter[str] = Counter()  # trees by reason

    def candidates(self) -> Iterator[Entry]:
        """Trees in order, to be encoded and offered to `take`, until the share is full."""
        for looked_at, tree in enumerate(self._trees):
            if self._misses == MOST_MISSES or not self._fits(1):
                self.left_out[FULL] = len(self._trees) - looked_at
                return
            yield tree

    def take(self, source: str, learned_tokens: int) -> bool:
        """Whether a conversation of so many learned tokens is taken; it is counted then."""
        if source == OPENASSISTANT and not self._fits(learned_tokens):
            self._misses += 1
            self.left_out[TOO_MUCH] += 1
            return False
        self.learned[source] += learned_tokens
        return True

    def to_json(self) -> dict[str, Any]:
        """As it stands in dataset.json."""
        whole = self.learned.total()
        reached = self.learned[OPENASSISTANT] / whole if whole else 0.0
        return {"learned_tokens": dict(self.learned), "openassistant_share": {"most": self._asked, "reached": reached}}

    def _fits(self, more: int) -> bool:
        trees = self.learned[OPENASSISTANT] + more
        return trees <= self._share * (self.learned.total() + more)
