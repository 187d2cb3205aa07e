"""How much of OpenAssistant is trained on: a share of the learned tokens, and the same trees as the collection grows."""

from collections.abc import Iterable
from dataclasses import dataclass

from mlx_finetune.data.clusters import place
from mlx_finetune.data.entries import Entry
from mlx_finetune.data.sources.openassistant import SOURCE

GIVE_UP = 16  # conversations that did not fit: the share is as good as reached


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """OpenAssistant's last, by the hash of their group: a smaller share takes the first of those that a larger one takes."""
    return sorted(entries, key=lambda e: (e.source == SOURCE, *((place(e.group), e.group) if e.source == SOURCE else (0.0, ""))))


@dataclass
class Mixture:
    """Counts learned tokens as they come, in the order of `in_order`; `share` None takes everything."""

    share: float | None
    others: int = 0  # learned tokens of the other sources
    taken: int = 0  # of OpenAssistant
    passed_over: int = 0

    @classmethod
    def of(cls, entries: Iterable[Entry], share: float) -> "Mixture":
        """A share of what? Where there is nothing but OpenAssistant, all of it is trained on."""
        return cls(share if any(e.source != SOURCE for e in entries) else None)

    def takes(self, source: str, tokens: int) -> bool:
        """Whether a conversation of so many learned tokens goes into the mixture; it is counted if so.

        One that would go beyond the share is passed over for the next. A few at most, so that what is taken are the first.
        """
        if source != SOURCE:
            self.others += tokens
            return True
        fits = self.share is None or self.taken + tokens <= self.share * (self.others + self.taken + tokens)
        self.taken += tokens if fits else 0
        self.passed_over += not fits
        return fits

    @property
    def full(self) -> bool:
        """Whether looking at more of OpenAssistant is in vain."""
        return self.passed_over >= GIVE_UP

    @property
    def reached(self) -> float:
        """OpenAssistant's part of the learned tokens."""
        return self.taken / max(self.others + self.taken, 1)
