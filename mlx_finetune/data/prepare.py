"""Collected conversations become a prepared data set: split, cut into windows, rendered, tokenized, counted."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import Example
from mlx_finetune.data.conversation import Conversation
from mlx_finetune.data.dataset import SPLITS, write_dataset
from mlx_finetune.data.entries import Entry, entries, read_entry
from mlx_finetune.data.exact import Piece, pieces_of
from mlx_finetune.data.mixture import Mixture, in_order
from mlx_finetune.data.overlap import AGAIN, once
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.sources import openassistant
from mlx_finetune.data.split import Split, split
from mlx_finetune.data.template import ChatTemplate, Encoded
from mlx_finetune.data.windows import Window, Windows, cut
from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_file, atomic_folder

NOT_CONVERSATIONS = ("rejected.jsonl", *(f"{name}.jsonl" for name in SPLITS))
SETTINGS = (
    "max_length", "valid_fraction", "validation_by", "openassistant_valid_fraction", "openassistant_share", "test_fraction",
    "allow_inexact",
)  # fmt: skip  # those of RunConfig that prepare obeys
Advance = Callable[[int, int], None]  # conversations done, conversations in all


@dataclass
class Tally:
    """What became of one split: every turn is learned or stands here with the reason."""

    conversations: Counter[str] = field(default_factory=Counter)  # by source
    examples: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    learned_tokens_by_source: Counter[str] = field(default_factory=Counter)
    placeholder_tokens: int = 0  # in learned turns, where a secret was: read, not learned
    learned_turns: int = 0
    exact_turns: int = 0  # learned turns that stand after exactly the tokens that a server feeds for the same messages
    exact_in_one_rendering: int = 0  # how many it would be if each window were rendered once
    served_as_trained: int = 0  # exact turns before which nothing of the conversation was cut
    turns_of_own_context: int = 0  # examples that exactness takes, and their tokens
    tokens_of_own_contexts: int = 0
    turns_behind_control_text: int = 0  # after text that names a control token, kept as text
    turns_inexact: Counter[str] = field(default_factory=Counter)  # learned in another context than is served, by reason
    turns_too_long: int = 0
    messages_shortened: int = 0
    messages_left_out: int = 0  # only read, and no window had room for them
    turns_refused: Counter[str] = field(default_factory=Counter)  # by reason

    def count(self, piece: Piece, conversation: Conversation) -> None:
        """Counts one example."""
        encoded, turns = piece.encoded, len(piece.window.turns)
        learned = int((encoded.weights > 0).sum())
        self.examples += 1
        self.tokens += len(encoded.tokens)
        self.learned_tokens += learned
        self.learned_tokens_by_source[conversation.source] += learned
        self.placeholder_tokens += encoded.placeholders
        self.learned_turns += turns
        self.exact_turns += encoded.served
        self.turns_behind_control_text += sum(encoded.as_text)
        whole = piece.window.whole and not conversation.meta.get("not_reproduced")
        self.served_as_trained += encoded.served if whole else 0
        self.turns_of_own_context += piece.own
        self.tokens_of_own_contexts += len(encoded.tokens) if piece.own else 0

    def add(self, other: "Tally") -> None:
        """Counts what the other has counted as well."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}


def collected_files(paths: Sequence[Path]) -> list[Path]:
    """The conversation files among `paths`; a folder stands for those that `collect` put into it.

    Raises:
        UserError: one of them is not there, holds none, or is named twice.
    """
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
    known: set[tuple[int, int]] = set()
    for file in files:
        status = file.stat()
        if (status.st_dev, status.st_ino) in known:
            raise UserError(f"{file}: named twice", hint="name each folder or file once: its conversations are learned once")
        known.add((status.st_dev, status.st_ino))
    return files


def prepare(
    paths: Sequence[Path],
    template: ChatTemplate,
    config: RunConfig,
    out: Path,
    origin: dict[str, Any],
    advance: Advance = lambda done, total: None,
) -> dict[str, Any]:
    """Makes the folder `out` whole or not at all; gives back its `dataset.json`, where `origin` (the model) stands too.

    The files are read twice: once for what decides the split, then conversation by conversation.

    Raises:
        UserError: a bad line, a path named twice, `out` exists, or there is nothing to learn.
    """
    found, again = once([entry for path in collected_files(paths) for entry in entries(path)])
    members = split(found, config)
    members = replace(members, left_out=members.left_out + Counter({AGAIN: again}))
    work = _Work(template, config, members, advance)
    info = {name: getattr(config, name) for name in SETTINGS} | {"tokenizer": template.fingerprint, **template.to_json(), **origin}
    with atomic_folder(out) as folder, ExitStack() as files:
        beside = {name: files.enter_context(atomic_file(folder / f"{name}.jsonl")) for name in SPLITS}
        examples = {name: work.examples(name, beside[name]) for name in SPLITS}
        return write_dataset(folder, examples, lambda: info | work.result())


class _Work:
    """Encodes one conversation after the other and counts what becomes of it."""

    def __init__(self, template: ChatTemplate, config: RunConfig, members: Split, advance: Advance) -> None:
        self.template, self.config, self.members, self.advance = template, config, members, advance
        self.tallies = {name: Tally() for name in SPLITS}
        self.mixture = Mixture.of(members.train, config.openassistant_share)
        self.beyond_share = 0
        self.done, self.total = 0, sum(len(getattr(members, name)) for name in SPLITS)

    def examples(self, name: str, beside: IO[str]) -> Iterator[Example]:
        """The examples of one split; the messages of each go into the file `beside`."""
        for entry in in_order(getattr(self.members, name)):
            if name == "train" and self.mixture.full:
                self.beyond_share += 1
            else:
                yield from self._examples_of(entry, name, beside)
            self.done += 1
            self.advance(self.done, self.total)

    def _examples_of(self, entry: Entry, name: str, beside: IO[str]) -> Iterator[Example]:
        conversation, tally = read_entry(entry), Tally()
        windows = list(_encoded(conversation, self.template, self.config.max_length, tally))
        if name == "train" and not self.mixture.takes(entry.source, tally.learned_tokens):
            self.beyond_share += 1
            return
        self.tallies[name].add(tally)
        for window, turns, encoded in windows:
            beside.write(json.dumps(_row(window, conversation), ensure_ascii=False) + "\n")
            yield Example(encoded.tokens, encoded.weights, conversation.source, conversation.id, turns)

    def result(self) -> dict[str, Any]:
        """The counts, once all splits are through; raises UserError where there is nothing to learn."""
        members, left_out = self.members, self.members.left_out.copy()
        if self.beyond_share:
            left_out[f"beyond the share of OpenAssistant, {self.config.openassistant_share:g} of the learned tokens"] = (
                self.beyond_share
            )
        if not self.tallies["train"].examples:
            _refuse_nothing(self.tallies["train"], left_out)
        if not self.config.allow_inexact:
            _refuse_inexact(sum((tally.turns_inexact for tally in self.tallies.values()), Counter()))
        return {name: tally.to_json() for name, tally in self.tallies.items()} | {
            "openassistant_share_reached": self.mixture.reached,
            "openassistant_all_taken": not self.beyond_share and any(e.source == openassistant.SOURCE for e in members.train),
            "left_out": dict(left_out),
            "held_out_groups": sorted(members.held_out_groups),
            "held_out_trees": sorted(members.held_out_trees),
            "held_out": sorted({entry.name for entry in members.valid if entry.group in members.held_out_groups}),
            "test_conversations": sorted({entry.name for entry in members.test}),
        }


def _refuse_nothing(train: Tally, left_out: Counter[str]) -> None:
    lost = [f"{reason} ({count})" for reason, count in (train.turns_refused + left_out).items()]
    lost += [f"turn longer than a window ({train.turns_too_long})"] if train.turns_too_long else []
    reasons = "; ".join(lost) or "no assistant turn"
    raise UserError(f"no conversation left to learn from: {reasons}", hint="collect more, or a larger max_length")


def _refuse_inexact(turns: Counter[str]) -> None:
    if turns:
        reason, count = turns.most_common(1)[0]
        raise UserError(
            f"{sum(turns.values())} turns would be learned in another context than is served, {count} of them: {reason}",
            hint="--allow-inexact learns them all the same",
        )


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
        pieces = pieces_of(window, result, template, conversation.tools, max_length)
        tally.turns_refused += pieces.refused
        tally.turns_inexact += pieces.inexact
        tally.exact_in_one_rendering += pieces.one_rendering
        for piece in pieces.pieces:
            tally.count(piece, conversation)
            yield piece.window, piece.window.turns, piece.encoded


def _fitting(conversation: Conversation, template: ChatTemplate, max_length: int) -> tuple[Windows, list[Encoded | Refused]]:
    """Windows that keep to `max_length` when they are rendered, and what became of each."""
    limit, tools = max_length, template.count_tools(conversation.tools)
    template.look_ahead(conversation.messages)
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
