"""Collected conversations become a prepared data set: split, cut into windows, rendered, tokenized, counted."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import Example
from mlx_finetune.data.conversation import Conversation, read_conversations
from mlx_finetune.data.dataset import write_dataset
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.split import held_out_groups, is_held_out
from mlx_finetune.data.template import ChatTemplate, Encoded
from mlx_finetune.data.windows import Window, Windows, cut
from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_file, atomic_folder

NOT_CONVERSATIONS = ("rejected.jsonl", "train.jsonl", "valid.jsonl")


@dataclass
class Tally:
    """What became of one split: every turn is learned or stands here with the reason."""

    conversations: Counter[str] = field(default_factory=Counter)  # by source
    examples: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    learned_turns: int = 0
    served_as_trained: int = 0  # learned turns that stand after exactly what a server would send
    turns_too_long: int = 0
    messages_shortened: int = 0
    messages_left_out: int = 0  # only read, and no window had room for them
    turns_refused: Counter[str] = field(default_factory=Counter)  # by reason

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}


def collected_files(paths: Sequence[Path]) -> list[Path]:
    """The conversation files among `paths`; a folder stands for those that `collect` put into it."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.glob("*.jsonl") if p.name not in NOT_CONVERSATIONS)
            if not inside:
                raise UserError(f"{path}: no conversations in this folder", hint="mlx-finetune collect makes them")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder", hint="mlx-finetune collect makes one")
    return files


def prepare(
    paths: Sequence[Path],
    template: ChatTemplate,
    config: RunConfig,
    out: Path,
    origin: dict[str, Any],
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Makes the folder `out` whole or not at all; gives back its `dataset.json`, where `origin` (the model) stands too.

    Raises:
        UserError: a bad line, `out` exists, or there is nothing to learn.
    """
    conversations = [c for path in collected_files(paths) for c in read_conversations(path)]
    held_out = held_out_groups(conversations, config.valid_fraction)
    tallies = {"train": Tally(), "valid": Tally()}
    members: dict[str, list[Conversation]] = {"train": [], "valid": []}
    for conversation in conversations:
        members["valid" if is_held_out(conversation, held_out) else "train"].append(conversation)
    finished = 0

    def examples(split: str, file: IO[str]) -> Iterator[Example]:
        nonlocal finished
        for conversation in members[split]:
            for window, turns, encoded in _encoded(conversation, template, config.max_length, tallies[split]):
                file.write(json.dumps(_row(window, conversation), ensure_ascii=False) + "\n")
                yield Example(encoded.tokens, encoded.weights, conversation.source, conversation.id, turns)
            finished += 1
            advance(finished, len(conversations))

    info = {"max_length": config.max_length, "valid_fraction": config.valid_fraction, "tokenizer": template.fingerprint, **origin}
    with (
        atomic_folder(out) as folder,
        atomic_file(folder / "train.jsonl") as train,
        atomic_file(folder / "valid.jsonl") as valid,
    ):
        splits = {"train": examples("train", train), "valid": examples("valid", valid)}
        return write_dataset(folder, splits, lambda: info | _result(tallies, members, held_out))


def _encoded(
    conversation: Conversation, template: ChatTemplate, max_length: int, tally: Tally
) -> Iterator[tuple[Window, tuple[int, ...], Encoded]]:
    """Each window that can be learned from, with the places in the conversation of the turns that it teaches."""
    windows, results = _fitting(conversation, template, max_length)
    _check_each_turn_once(conversation, windows)
    tally.conversations[conversation.source] += 1
    tally.turns_too_long += len(windows.too_long)
    tally.messages_shortened += windows.shortened
    tally.messages_left_out += windows.left_out
    for window, result in zip(windows.windows, results, strict=True):
        if isinstance(result, Refused):
            tally.turns_refused[str(result)] += len(window.turns)
            continue
        places = [i for i, message in enumerate(window.messages) if message.role == "assistant" and message.weight > 0]
        turns = tuple(turn for turn, place in zip(window.turns, places, strict=True) if place in result.turns)
        if blank := len(window.turns) - len(turns):
            tally.turns_refused["a turn of blanks"] += blank
        if not turns:
            continue
        tally.examples += 1
        tally.tokens += len(result.tokens)
        tally.learned_tokens += int((result.weights > 0).sum())
        tally.learned_turns += len(turns)
        tally.served_as_trained += result.served if window.whole and not conversation.meta.get("not_reproduced") else 0
        yield window, turns, result


def _fitting(conversation: Conversation, template: ChatTemplate, max_length: int) -> tuple[Windows, list[Encoded | Refused]]:
    """Windows that keep to `max_length` when they are rendered, and what became of each."""
    limit, tools = max_length, template.count_tools(conversation.tools)
    while True:
        windows = cut(conversation, template.count, limit, tools)
        results = [_encode(window, template, conversation.tools) for window in windows.windows]
        excess = max((len(result.tokens) for result in results if isinstance(result, Encoded)), default=0) - max_length
        if excess <= 0:
            return windows, results
        limit -= excess  # counts are estimates: this template adds more than the probe showed


def _encode(window: Window, template: ChatTemplate, tools: Sequence[dict[str, Any]]) -> Encoded | Refused:
    try:
        return template.encode(window.messages, tools)
    except Refused as refused:
        return refused


def _check_each_turn_once(conversation: Conversation, windows: Windows) -> None:
    counted = Counter(turn for window in windows.windows for turn in window.turns) + Counter(windows.too_long)
    expected = [i for i, m in enumerate(conversation.messages) if m.role == "assistant" and m.weight > 0]
    assert counted == Counter(expected), f"{conversation.id}: turns {expected} became {counted}"


def _row(window: Window, conversation: Conversation) -> dict[str, Any]:
    """A line that TRL, axolotl and mlx-lm read; `weight` as OpenAI's format has it: 0 is context only."""
    messages = [replace(m, reason="").to_json() | {"weight": int(m.weight > 0)} for m in window.messages]
    tools = {"tools": list(conversation.tools)} if conversation.tools else {}
    return {"messages": messages, "source": conversation.source, "conversation": conversation.id} | tools


def _result(tallies: dict[str, Tally], members: dict[str, list[Conversation]], held_out: frozenset[str]) -> dict[str, Any]:
    train = tallies["train"]
    if not train.examples:
        lost = [f"{reason} ({count})" for reason, count in train.turns_refused.items()]
        lost += [f"turn longer than a window ({train.turns_too_long})"] if train.turns_too_long else []
        reasons = "; ".join(lost) or "no assistant turn"
        raise UserError(f"no conversation left to learn from: {reasons}", hint="collect more, or a larger max_length")
    titles = sorted({str(c.meta.get("name", c.group)) for c in members["valid"]})
    return {
        "train": train.to_json(),
        "valid": tallies["valid"].to_json(),
        "held_out_groups": sorted(held_out),
        "held_out": titles,
    }
