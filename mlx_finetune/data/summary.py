"""What became of everything that was found, in numbers: the content of collect.json."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlx_finetune.data.collection import Kept, Unit
from mlx_finetune.data.dedupe import Decision

NAMED_BAD_LINES = 100
ELSEWHERE = "learned in another conversation"
HINTS = {  # by what a reason holds: how to get what was rejected for it
    "is in a wanted language": "name another --language, or --language any, which takes every one",
    "not about programming": "--relevant any takes every subject",
    "is labelled": "--no-openassistant-filters takes what raters marked too",
    "is of low quality": "lower --min-quality, or take everything with --no-openassistant-filters",
    "its first answer": "--no-openassistant-filters takes what names or speaks as another assistant too",
    "tree is": "pass a file of OpenAssistant's finished trees, such as oasst2_ready.trees.jsonl.gz, or OpenAssistant/oasst2",
    "of gptme": "NAME: keep in a file for --tags takes a log that gptme's own rules leave out",
    "a gptme evaluation": "NAME: keep in a file for --tags takes a log that gptme's own rules leave out",
    "goes in circles": "NAME: keep in a file for --tags takes a log whatever the rules say",
    "apologises": "NAME: keep in a file for --tags takes a log whatever the rules say",
    "a test split": "pass rows of another split: what is kept for tests is never learned",
    "a preference": 'write the chosen answers as "completion" to learn them',
}
NEEDED = "name another logs folder, or add --openassistant or --chat FILE: each needs a user turn and an assistant turn"
DUPLICATES = ("near-duplicate of ", "duplicate of ", "beginning of ")  # before the name of the other


def countable(reason: str) -> str:
    """The reason without the name that it gives."""
    return next((start.removesuffix(" of ") for start in DUPLICATES if reason.startswith(start)), reason)


def hint_for(reason: str) -> str:
    """What to do where all or most was rejected for this reason, as it is counted."""
    if reason.startswith("not selected: "):
        return f"leave out {' and '.join(re.findall(r'--[a-z-]+', reason)) or '--tags'}, or choose more with it"
    return next((hint for part, hint in HINTS.items() if part in reason), NEEDED)


def summarise(units: Sequence[Unit], decision: Decision, everything: Sequence[Kept], distinct: Mapping[str, int]) -> dict[str, Any]:
    """Counts of conversations, turns, characters and secrets, by source and reason.

    `distinct`: secrets by kind, each counted once. Characters are of what was kept, by source and role.
    """
    kept = [(i, one) for i, one in enumerate(everything) if i not in decision.dropped]
    counts: Counter[str] = Counter()
    by_source: dict[str, Counter[str]] = {one.source: Counter() for one in everything}
    for i, one in kept:
        elsewhere = len(decision.context.get(i, ()))
        counts += one.counts
        counts[f"context: {ELSEWHERE}"] += elsewhere
        by_source[one.source] += one.counts
        by_source[one.source]["kept"] += 1
        by_source[one.source]["turns"] -= elsewhere
    rejected = Counter(one.countable or one.reason for unit in units for one in unit.rejected)
    rejected += Counter(countable(reason) for reason in decision.dropped.values())
    bad_lines = [bad.to_json() for unit in units for bad in unit.bad_lines]
    return {
        "found": _found(units, everything),
        "conversations": {source: each["kept"] for source, each in by_source.items()},
        "assistant_turns": {source: each["turns"] for source, each in by_source.items()},
        "rejected": dict(rejected.most_common()),
        "context_only": _of(counts, "context: "),
        "recoveries": counts["recoveries"],
        "secrets": _of(counts, "secret: "),
        "distinct_secrets": dict(distinct),
        "formats": _of(counts, "format: "),
        "system_prompts": _of(counts, "prompt: "),
        "served_by": _of(counts, "served by: "),
        "characters": {source: _of(each, "characters: ") for source, each in by_source.items()},
        "bad_line_count": len(bad_lines) + sum(unit.more_bad_lines for unit in units),
        "bad_lines": bad_lines[:NAMED_BAD_LINES],
    }


def _found(units: Iterable[Unit], everything: Sequence[Kept]) -> dict[str, int]:
    found = Counter(one.source for one in everything)
    found += Counter(one.source for unit in units for one in unit.rejected)
    return dict(found)


def _of(counts: Mapping[str, int], prefix: str) -> dict[str, int]:
    chosen = Counter({name.removeprefix(prefix): n for name, n in counts.items() if name.startswith(prefix) and n})
    return dict(chosen.most_common())
