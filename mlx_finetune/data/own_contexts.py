"""Which examples of a prepared folder are one turn in a context of its own, which are one rendering, and how exact they are.

The arrays alone do not tell. The messages of each example stand in the file beside them, so the window is put together again and
asked the question that `prepare` asked: does one rendering serve this turn exactly?
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from mlx_finetune.data.batches import Example
from mlx_finetune.data.conversation import Conversation, Message, conversation_of_line
from mlx_finetune.data.exact import learned_places
from mlx_finetune.data.overview import Overview
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.template import ChatTemplate


def own_contexts(beside: Path, examples: Overview, wanted: Sequence[int], template: ChatTemplate) -> dict[int, bool]:
    """Of each example in `wanted`, whether its only turn has its own context; one of which that cannot be told is not in it.

    `beside`: the `.jsonl` file of the split. A turn stands in an example of its own where no other turn does; the window
    that it comes from shares its beginning with its neighbours.
    """
    found = {i: False for i in wanted if examples.turns[i] > 1}
    alone = [i for i in wanted if examples.turns[i] == 1]
    near = {i: examples.neighbours(i) for i in alone}
    needed = {place for places in near.values() for place in places}
    rows = dict(_rows(beside, needed)) if beside.is_file() else {}
    known: dict[tuple[int, ...], dict[int, bool]] = {}
    for i in alone:
        if all(place in rows for place in near[i]):
            family = tuple(j for j in near[i] if _nested(rows[i].messages, rows[j].messages))
            if family not in known:
                known[family] = _shared_places([rows[j] for j in family], template)
            places = learned_places(rows[i].messages)
            found |= {i: not known[family].get(places[0], False)} if len(places) == 1 else {}
    return found


def exact_turns(beside: Path, wanted: Mapping[int, Example], own: Mapping[int, bool], template: ChatTemplate) -> dict[int, int]:
    """Of each example in `wanted`, how many of its turns stand after exactly what a server feeds; not of which that is unknown.

    `own`: as `own_contexts` tells it; a turn in a context of its own is exact, or `prepare` would have no such example.
    """
    found = {i: 1 for i in wanted if own.get(i)}
    shared = {i for i in wanted if own.get(i) is False}
    for i, row in _rows(beside, shared) if beside.is_file() else ():
        try:
            encoded = template.encode(row.messages, row.tools)
        except Refused:
            continue
        found |= {i: encoded.served} if np.array_equal(encoded.tokens, wanted[i].tokens) else {}
    return found


def _rows(path: Path, needed: set[int]) -> Iterator[tuple[int, Conversation]]:
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(islice(file, max(needed, default=-1) + 1)):
            if number in needed:
                yield number, conversation_of_line(line, f"{path}:{number + 1}")


def _nested(one: Sequence[Message], other: Sequence[Message]) -> bool:
    """Whether the shorter is the beginning of the longer, whatever is learned of them."""
    return all(replace(a, weight=1.0) == replace(b, weight=1.0) for a, b in zip(one, other, strict=False))


def _shared_places(family: Sequence[Conversation], template: ChatTemplate) -> dict[int, bool]:
    """Of each learned place of a window, whether one rendering of it serves the turn."""
    window = max(family, key=lambda row: len(row.messages))
    places = {place for row in family for place in learned_places(row.messages)}
    messages = [replace(m, weight=float(i in places)) if m.role == "assistant" else m for i, m in enumerate(window.messages)]
    try:
        encoded = template.encode(messages, window.tools)
    except Refused:
        return {}
    return {p: exact or text for p, exact, text in zip(encoded.turns, encoded.exact, encoded.as_text, strict=True)}
