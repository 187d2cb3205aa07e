"""What stands in several collections: each conversation is taken once, and what belongs together in one of them does in all."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mlx_finetune.data.clusters import Clusters, label_of
from mlx_finetune.data.entries import Entry
from mlx_finetune.data.fingerprint import rank_of
from mlx_finetune.data.sources import gptme

AGAIN = "the same conversation again"


def once(entries: Sequence[Entry]) -> tuple[list[Entry], int]:
    """The entries in their order without copies of equal id, in joined groups; and how many copies there were.

    Of copies with a turn to learn in common that with the fewest is taken: what it only reads is learned in another
    conversation of its collection.
    """
    taken: dict[str, list[int]] = {}
    copies: set[int] = set()
    for k in sorted(range(len(entries)), key=lambda k: entries[k].learned.bit_count()):
        learned, others = entries[k].learned, taken.setdefault(entries[k].id, [])
        if any(learned & other or learned == other for other in others):
            copies.add(k)
        else:
            others.append(learned)
    return [entry for k, entry in enumerate(_joined(entries)) if k not in copies], len(copies)


def _joined(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Equal conversations and states of one log are in one group, under the label that stays in the test split."""
    clusters = Clusters(len(entries))
    first: dict[tuple[str, str], int] = {}
    for k, entry in enumerate(entries):
        keys = [("group", entry.group), ("id", entry.id)] + ([("log", entry.name)] if entry.source == gptme.SOURCE else [])
        for key in keys:
            clusters.join(k, first.setdefault(key, k))
        clusters.offer(k, label_of(entry.group, rank_of(entry.source)))
    for k, entry in enumerate(entries):
        label = clusters.label(k)
        yield entry if label == entry.group else replace(entry, group=label)
