"""Chats as tokens with loss weights: which tokens a turn is, and whether a server would feed the very tokens before it."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.emission import NO_END, Emission, Tools, Turn, emission, turn_at, turn_with_calls
from mlx_finetune.data.provenance import Refused, Span, locate
from mlx_finetune.data.redact import PLACEHOLDER
from mlx_finetune.data.rows import rows_of, texts_of
from mlx_finetune.data.segments import moved
from mlx_finetune.data.token_roles import tokens_by_role
from mlx_finetune.data.words import Ids, arrays_of

if TYPE_CHECKING:
    from mlx_finetune.data.template import ChatTemplate


@dataclass(frozen=True)
class Encoded:
    """Tokens of a rendered chat; `weights[i]` is how much predicting `tokens[i]` counts."""

    tokens: np.ndarray  # int32 [T]
    weights: np.ndarray  # float32 [T]
    turns: tuple[int, ...]  # indices of the messages that are learned
    exact: tuple[bool, ...]  # of each turn, whether exactly the tokens stand before it that a server would feed
    as_text: tuple[bool, ...]  # whether it is so but for the name of a control token kept as text, which a server misreads
    placeholders: int  # tokens of the learned turns that stand for a redacted secret: weight 0
    by_role: Counter[str] = field(default_factory=Counter)  # tokens by role of the message that they are of; see token_roles

    @property
    def served(self) -> int:
        """How many turns are exact."""
        return sum(self.exact)


@dataclass(frozen=True)
class _Tokens:
    """Tokens with the characters that they stand for."""

    ids: np.ndarray  # int32 [T]
    starts: np.ndarray  # int64 [T]
    ends: np.ndarray  # int64 [T], exclusive
    kept_as_text: tuple[int, ...]  # where messages start that name a control token

    def between(self, start: int, end: int) -> np.ndarray:
        """bool [T]: the tokens of the turn from `start` on, and the control token that begins at `end`.

        Raises:
            Refused: a token straddles one of the two.
        """
        if any(np.any((self.starts < edge) & (self.ends > edge)) for edge in (start, end)):
            raise Refused("a token straddles the edge of a turn")
        return (self.starts >= start) & (self.starts <= end)

    def touching(self, start: int, end: int) -> np.ndarray:
        """bool [T]: the tokens that hold any character from `start` to `end` (exclusive)."""
        return (self.starts < end) & (self.ends > start)


def encode(template: "ChatTemplate", messages: Sequence[Message], tools: Tools = ()) -> Encoded:
    """One rendering: every assistant message with its end-of-turn token is learned, and nothing else.

    The tool calls of a message are a part of it. What stands for a redacted secret is read but not learned.

    Raises:
        Refused: the template loses or rewrites text, or a turn's edge falls inside a token.
    """
    messages = template.as_learned(messages)
    text, spans = locate(lambda each: template.render(each, tools=tools), messages)
    _check_no_control_token(template, messages, tools)
    learned = _learned(template, messages, tools, text, spans)
    for turn in learned.values():
        text = turn.closed(text)
    tokens = _tokenize(
        template, text, [span for span in spans if span and template.names_control_token(text[span.start : span.end])]
    )
    weights = np.zeros(len(tokens.ids), np.float32)
    placeholders = 0
    for index, turn in learned.items():
        weights[tokens.between(turn.start, turn.end)] = messages[index].weight
        placeholders += _hide_secrets(tokens, weights, text, turn.start, turn.end)
    endings = sorted({turn.ending for turn in learned.values()})
    if len(endings) > 1 and not template.ends.stops:
        raise Refused(f"the template ends assistant turns in different ways: {' '.join(endings)}")
    if weights[:1].any():
        raise Refused("nothing stands before the first turn")
    exact, as_text = _exact(template, messages, tools, text, tokens, {index: turn.start for index, turn in learned.items()})
    whose = [learned[i].span if i in learned else span for i, span in enumerate(spans)]
    by_role = tokens_by_role([message.role for message in messages], whose, tokens.starts, tokens.ends)
    return Encoded(tokens.ids, weights, tuple(learned), exact, as_text, placeholders, by_role)


def encode_turn(template: "ChatTemplate", messages: Sequence[Message], tools: Tools = ()) -> Encoded:
    """The last message, an assistant's, in a context of its own: the tokens of `prompt(messages[:-1])`, then the turn.

    Whatever the template makes of the messages before it (thinking taken out, a date) is what a server feeds too. An empty
    think block that it would write before the turn is left out, for the prompt has none; what the model itself must write to get
    to its answer (the end of thinking that the prompt began, a channel's name) is learned.

    Raises:
        Refused: the template loses what others said before the turn, rewrites the turn, or writes nothing that ends it.
    """
    messages = template.as_learned(messages)
    before, turn = messages[:-1], messages[-1]
    assert turn.role == "assistant" and turn.weight > 0
    _check_no_control_token(template, messages, tools)
    prompt, spans = locate(lambda each: template.render(each, True, tools), before, lenient=True)
    emitted = emission(template, messages, prompt, tools)
    tokens, fed = _joined(template, prompt, emitted)
    if not fed:
        raise Refused("nothing stands before the first turn")
    weights = np.zeros(len(tokens.ids), np.float32)
    weights[fed:] = turn.weight
    written = prompt + emitted.written
    placeholders = _hide_secrets(tokens, weights, written, len(prompt), len(written))
    whose = [*spans, Span(len(prompt), len(written + emitted.ending))]
    by_role = tokens_by_role([message.role for message in messages], whose, tokens.starts, tokens.ends)
    return Encoded(tokens.ids, weights, (len(before),), (True,), (False,), placeholders, by_role)


def _hide_secrets(tokens: "_Tokens", weights: np.ndarray, text: str, start: int, end: int) -> int:
    """Sets the weights of what stands for a secret in a turn to 0; how many tokens that are."""
    count = 0
    for placeholder in PLACEHOLDER.finditer(text, start, end):
        hidden = tokens.touching(*placeholder.span())
        count += int((weights[hidden] > 0).sum())
        weights[hidden] = 0
    return count


def _joined(template: "ChatTemplate", prompt: str, emitted: Emission) -> tuple["_Tokens", int]:
    """The tokens that a server feeds, those of the turn and its end, and how many the first are."""
    text = emitted.written + emitted.ending
    fed, *places = template.segments.encode(prompt)
    named = template.names_control_token(emitted.core)
    if not named:
        whole = _tokenize(template, prompt + text, [])
        if np.array_equal(whole.ids[: len(fed)], fed) and (whole.starts[len(fed) :] >= len(prompt)).all():
            return whole, len(fed)
    if not template.pieces_join:
        raise Refused("a token straddles the edge of a turn")
    core = Span(len(emitted.lead), len(emitted.lead) + len(emitted.core))
    turn = _tokenize(template, text, [core] if named else [])
    own = moved((turn.ids, turn.starts, turn.ends), len(prompt))
    ids, starts, ends = (np.concatenate(each) for each in zip((fed, *places), own, strict=True))
    return _Tokens(ids, starts, ends, ()), len(fed)


def _learned(
    template: "ChatTemplate", messages: Sequence[Message], tools: Tools, text: str, spans: Sequence[Span | None]
) -> dict[int, Turn]:
    """Where each learned message stands; calls of the others are looked at too, for a dropped one would mislead."""
    turns: dict[int, Turn] = {}
    starts = sorted(span.start for span in spans if span)
    for index, (message, span) in enumerate(zip(messages, spans, strict=True)):
        if message.role == "assistant" and (message.tool_calls or (span and message.weight > 0)):
            plain = span if not message.tool_calls else None
            turn = turn_at(template, text, plain) if plain else turn_with_calls(template, messages, index, text, span, tools)
            if bisect_right(starts, turn.end + len(turn.ending) - 1) > bisect_right(starts, span.start if span else turn.start):
                raise Refused(NO_END)  # another message stands before it, or the name of such a token in one
            turns |= {index: turn} if message.weight > 0 else {}
    return turns


def _exact(
    template: "ChatTemplate", messages: Sequence[Message], tools: Tools, text: str, tokens: "_Tokens", starts: Mapping[int, int]
) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """Of each turn, whether a server would be asked for it with the very tokens that stand before it here.

    And whether it would but for the name of a control token before it, which is kept as text.
    """
    control = np.flatnonzero(np.isin(tokens.ids, template.special_ids))
    exact, as_text, rows = [], [], rows_of(messages)
    for index, start in starts.items():
        named = any(place < start for place in tokens.kept_as_text)
        served = _is_prompt(template, rows[:index], tools, text[:start])
        as_text.append(served and named)
        if not served or named:
            exact.append(False)
            continue
        count = int(np.searchsorted(tokens.starts, start))
        # Whole words before a control token do not depend on what follows it: the last stretch is enough.
        first = int(control[np.searchsorted(control, count) - 1]) if control.size and control[0] < count else 0
        exact.append(template.prompt_tokens(text[tokens.starts[first] : start]) == tokens.ids[first:count].tolist())
    return tuple(exact), tuple(as_text)


def _is_prompt(template: "ChatTemplate", rows: Sequence[dict[str, Any]], tools: Tools, before: str) -> bool:
    try:
        return template.render_rows(rows, True, tools) == before
    except Refused:
        return False


def _check_no_control_token(template: "ChatTemplate", messages: Sequence[Message], tools: Tools) -> None:
    calls = [call for message in messages for call in message.tool_calls]
    if any(template.names_control_token(text) for text in texts_of(calls, tools)):
        raise Refused("a tool call or schema holds the text of a control token")


def _tokenize(template: "ChatTemplate", text: str, as_text: Sequence[Span]) -> _Tokens:
    """Tokens of the rendered chat; in the messages at `as_text` the name of a control token stays text."""
    if as_text and not template.pieces_join:
        raise Refused("a message holds the text of a control token, which this tokenizer cannot keep as text")
    pieces: list[Ids] = []
    end = 0
    for span in sorted(as_text, key=lambda span: span.start):
        plain = template.plain.encode(text[span.start : span.end], add_special_tokens=False)
        pieces += [moved(template.segments.encode(text[end : span.start]), end), moved(arrays_of(plain), span.start)]
        end = span.end
    pieces.append(moved(template.segments.encode(text[end:]), end))
    ids, starts, ends = (np.concatenate(each) for each in zip(*pieces, strict=True))
    return _Tokens(ids, starts, ends, tuple(span.start for span in as_text))
