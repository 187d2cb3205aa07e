"""Who is trained on, who is held out, who is set aside for a test: whole groups, so that nothing held out is trained on too."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlx_finetune.config import RunConfig
from mlx_finetune.data.clusters import place, place_in_test
from mlx_finetune.data.entries import Entry
from mlx_finetune.data.sources import gptme, openassistant

MOST_TREES_HELD_OUT = 50  # some 20,000 tokens: each look at the held-out loss stays short
WITH_TEST = "same group as a test conversation"
WITH_HELD_OUT = "same group as a held-out conversation"


@dataclass(frozen=True)
class Split:
    """Every conversation stands in one of the three or is counted in `left_out`, by the reason."""

    train: tuple[Entry, ...]
    valid: tuple[Entry, ...]
    test: tuple[Entry, ...]
    left_out: Counter[str]
    held_out_groups: frozenset[str]  # of gptme; of other chats where there is no gptme
    held_out_trees: frozenset[str]  # of OpenAssistant


def split(entries: Sequence[Entry], config: RunConfig) -> Split:
    """Test and validation come from gptme (where there is none, from other chats), and a few trees from OpenAssistant.

    Whether a group is in the test split depends on its label alone, so that it never changes, whichever of its members a
    larger collection has.
    """
    judged = _judged(entries)
    tested = frozenset(e.group for e in judged if place_in_test(e.group) < config.test_fraction)
    rest = [e for e in judged if e.group not in tested]
    groups = _latest(rest)
    chosen = newest if config.validation_by == "time" else lowest
    held_out = chosen(groups, config.valid_fraction)
    trees = _trees(entries, config)
    left_out: Counter[str] = Counter()
    members: dict[str, list[Entry]] = {"train": [], "valid": [], "test": []}
    sources = {e.source for e in judged}
    for entry in entries:
        of_test, of_valid = entry.group in tested, entry.group in held_out
        if of_test and entry.source not in sources:
            left_out[WITH_TEST] += 1
        elif of_valid and entry.source not in sources:
            left_out[WITH_HELD_OUT] += 1
        else:
            apart = entry.source == openassistant.SOURCE and entry.group in trees
            members["test" if of_test else "valid" if of_valid or apart else "train"].append(entry)
    train, valid, test_entries = (tuple(each) for each in members.values())
    return Split(train, valid, test_entries, left_out, held_out, trees)


def newest(groups: Mapping[str, float], fraction: float) -> frozenset[str]:
    """So large a part of the groups, those that were last written to. At least one, and never all.

    A group counts as its newest member: whatever is trained on was there before the last word of anything held out. What has
    no time counts as oldest; where times are equal, the hash decides.
    """
    if fraction == 0 or len(groups) < 2:
        return frozenset()
    count = min(max(round(len(groups) * fraction), 1), len(groups) - 1)
    return frozenset(sorted(groups, key=lambda group: (-groups[group], place(group), group))[:count])


def lowest(groups: Iterable[str], fraction: float, most: int | None = None) -> frozenset[str]:
    """The groups whose place lies below `fraction`: the same ones as the collection grows.

    With few groups chance may choose none or all: then one is held out, or one stays, if there are two or more.
    """
    ordered = sorted(set(groups), key=place)
    if fraction == 0 or len(ordered) < 2:
        return frozenset()
    chosen = sum(place(group) < fraction for group in ordered)
    return frozenset(ordered[: min(max(chosen, 1), len(ordered) - 1)][:most])


def _judged(entries: Sequence[Entry]) -> list[Entry]:
    """The conversations that a model is judged by."""
    own = [e for e in entries if e.source == gptme.SOURCE]
    return own or [e for e in entries if e.source != openassistant.SOURCE]


def _latest(entries: Iterable[Entry]) -> dict[str, float]:
    """Each group with the time of its newest member."""
    times: dict[str, float] = {}
    for entry in entries:
        times[entry.group] = max(times.get(entry.group, entry.time), entry.time)
    return times


def _trees(entries: Sequence[Entry], config: RunConfig) -> frozenset[str]:
    """The OpenAssistant groups that are held out: none that another source has a part in, and none where it is not trained on."""
    others = {e.group for e in entries if e.source != openassistant.SOURCE}
    if others and config.openassistant_share == 0:
        return frozenset()
    trees = {e.group for e in entries if e.source == openassistant.SOURCE} - others
    return lowest(trees, config.openassistant_valid_fraction, MOST_TREES_HELD_OUT)
