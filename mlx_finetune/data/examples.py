"""A conversation becomes examples: windows, their tokens, a line of messages beside each; many in several processes."""

import json
import pickle
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_finetune.data.batches import Example
from mlx_finetune.data.conversation import Conversation, Message
from mlx_finetune.data.encoding import Encoded
from mlx_finetune.data.entries import Entry, read_entry
from mlx_finetune.data.exact import pieces_of
from mlx_finetune.data.pool import chunks, spread, workers
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.rows import arguments_of
from mlx_finetune.data.tally import Tally
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.data.windows import Window, Windows, cut

MUCH = 16 * 2**20  # bytes of conversations from which starting processes pays
CHUNK = 2**20  # bytes of conversations that one process takes at a time
Asked = tuple[str, Entry]  # the split that it is for


@dataclass(frozen=True)
class Made:
    """The examples of one conversation, and for each the line of its messages, without the newline."""

    tally: Tally
    examples: tuple[Example, ...]
    lines: tuple[str, ...]


def make_all(asked: Iterable[Asked], template: ChatTemplate, max_length: int, alone: bool) -> Generator[tuple[Asked, Made]]:
    """Of each that is asked for, in order; some are asked for ahead. `alone`: in this process, as where there is little to do.

    Raises:
        UserError: a file was changed, or a helper was ended from outside.
    """
    if alone:
        yield from ((one, make_examples(read_entry(one[1]), template, max_length)) for one in asked)
        return
    parts = chunks(asked, lambda one: one[1].length, CHUNK)
    with tempfile.NamedTemporaryFile() as file:  # much would fill the pipe to a helper that never starts
        pickle.dump(template, file)
        file.flush()
        with closing(spread(_make_chunk, parts, "prepare", _remember, (file.name, max_length))) as made:
            for chunk in made:
                yield from chunk


def is_little(entries: Iterable[Entry]) -> bool:
    """Whether one process is sooner done than several."""
    return workers() == 1 or sum(entry.length for entry in entries) < MUCH


_remembered: list[tuple[ChatTemplate, int]] = []  # of a helper process: what it was started with


def _remember(path: str, max_length: int) -> None:
    with open(path, "rb") as file:  # noqa: PTH123
        _remembered.append((pickle.load(file), max_length))  # noqa: S301  written by the program that started it


def _make_chunk(asked: Sequence[Asked]) -> list[tuple[Asked, Made]]:
    template, max_length = _remembered[-1]
    return [(one, make_examples(read_entry(one[1]), template, max_length)) for one in asked]


def make_examples(conversation: Conversation, template: ChatTemplate, max_length: int) -> Made:
    """Every turn is in one of the examples, or counted with the reason why not."""
    tally = Tally()
    windows, results = _fitting(conversation, template, max_length)
    _check_each_turn_once(conversation, windows)
    tally.conversations[conversation.source] += 1
    tally.turns_too_long += len(windows.too_long)
    tally.messages_shortened += windows.shortened
    tally.messages_left_out += windows.left_out
    tally.windows_with_short_prompt += windows.short_prompts
    examples, lines = [], []
    for window, result in zip(windows.windows, results, strict=True):
        pieces = pieces_of(window, result, template, conversation.tools, max_length)
        tally.turns_refused += pieces.refused
        tally.turns_inexact += pieces.inexact
        tally.exact_in_one_rendering += pieces.one_rendering
        for piece in pieces.pieces:
            tally.count(piece, conversation)
            turns, encoded = piece.window.turns, piece.encoded
            arrays, names = (encoded.tokens, encoded.weights), (conversation.source, conversation.id)
            examples.append(Example(*arrays, *names, turns, encoded.served, piece.own))
            lines.append(json.dumps(_row(piece.window, conversation), ensure_ascii=False))
    tally.turn_tokens += windows.turn_tokens
    tally.turn_tokens_by_truncation += windows.truncated_tokens
    learned = {turn for example in examples for turn in example.turns}
    lost = [i for i in _turns(conversation) if i not in learned]
    tally.turn_tokens_learned += windows.turn_tokens - sum(template.count(conversation.messages[i]) for i in lost)
    return Made(tally, tuple(_in_families(examples, conversation.group)), tuple(lines))


def _in_families(examples: Sequence[Example], group: str) -> Iterator[Example]:
    """With the name of their family: as long as each has more than half of its tokens in common with the one before it."""
    number = 0
    for i, example in enumerate(examples):
        if i:
            before, length = examples[i - 1].tokens, len(example.tokens)
            shared = np.cumprod(before[:length] == example.tokens[: len(before)]).sum()
            number += int(shared * 2 < min(length, len(before)))
        yield replace(example, family=f"{group} {number}")


def _fitting(conversation: Conversation, template: ChatTemplate, max_length: int) -> tuple[Windows, list[Encoded | Refused]]:
    """Windows that keep to `max_length` when they are rendered, and what became of each."""
    limit, tools = max_length, template.count_tools(conversation.tools)
    template.look_ahead(conversation.messages, conversation.tools)
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


def _turns(conversation: Conversation) -> list[int]:
    return [i for i, m in enumerate(conversation.messages) if m.role == "assistant" and m.weight > 0]


def _check_each_turn_once(conversation: Conversation, windows: Windows) -> None:
    counted = Counter(turn for window in windows.windows for turn in window.turns) + Counter(windows.too_long)
    expected = _turns(conversation)
    assert counted == Counter(expected), f"{conversation.id}: turns {expected} became {counted}"


def _row(window: Window, conversation: Conversation) -> dict[str, Any]:
    """A line that TRL, axolotl and mlx-lm read; `weight` as OpenAI's format has it: 0 is context only."""
    messages = [_as_rendered(m).to_json() | {"weight": int(m.weight > 0)} for m in window.messages]
    tools = {"tools": list(conversation.tools)} if conversation.tools else {}
    return {"messages": messages, "source": conversation.source, "conversation": conversation.id} | tools


def _as_rendered(message: Message) -> Message:
    """Arguments as templates write them, so that those who hand them on as text render what is trained."""
    calls = (replace(c, arguments=json.dumps(arguments_of(c), ensure_ascii=False)) for c in message.tool_calls)
    return replace(message, reason="", tool_calls=tuple(calls))
