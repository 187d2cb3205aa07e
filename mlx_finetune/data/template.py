"""The model's own chat template and tokenizer: a conversation becomes tokens, and each learned token is known by its place."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.data.conversation import Message, ToolCall
from mlx_finetune.data.provenance import Refused, Span, locate
from mlx_finetune.data.redact import PLACEHOLDER
from mlx_finetune.data.rows import check_written, rows_of, texts_of
from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json

Tools = Sequence[dict[str, Any]]
CALL_OVERHEAD = 24  # tokens that a template adds to a call, about: its tags and the names of its fields
NO_END = "no end-of-turn token follows an assistant message: the model would not learn to stop"
PROBE = (Message("system", "S"), Message("user", "U"), Message("assistant", "A"), Message("user", "V"), Message("assistant", "B"))


@dataclass(frozen=True)
class Encoded:
    """Tokens of a rendered chat; `weights[i]` is how much predicting `tokens[i]` counts."""

    tokens: np.ndarray  # int32 [T]
    weights: np.ndarray  # float32 [T]
    turns: tuple[int, ...]  # indices of the messages that are learned
    served: int  # how many of them stand after exactly the tokens that a server would feed
    placeholders: int = 0  # tokens of the learned turns that stand for a redacted secret: weight 0


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


@dataclass(frozen=True)
class _Turn:
    """A learned turn: characters `start` to `end`, where the control token `ending` begins."""

    start: int
    end: int
    ending: str


class ChatTemplate:
    """Renders and tokenizes; build it with `ChatTemplate.load`."""

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int]) -> None:
        """`tokenizer`: a fast tokenizer of transformers with a chat template; `stop_ids`: where a server stops."""
        from tokenizers import Tokenizer

        self._tokenizer = tokenizer
        self.stop_ids = stop_ids
        # Its post-processor could only add tokens that the template writes itself, or trim the offsets that masks rest on.
        backend = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": None})
        self._special, self._plain = Tokenizer.from_str(backend), Tokenizer.from_str(backend)
        self._plain.encode_special_tokens = True  # a literal <|im_end|> in a message stays text
        for encoder in (self._special, self._plain):
            encoder.no_truncation()
            encoder.no_padding()
        control = {i: token.content for i, token in self._special.get_added_tokens_decoder().items() if token.special}
        self._special_ids = list(control)
        self._special_texts = sorted(control.values(), key=len, reverse=True)

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate":
        """Reads tokenizer and chat template of a model folder; no code from the folder is run.

        Raises:
            UserError: there is no tokenizer or no chat template, or it is one that cannot be learned from exactly.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{folder}: tokenizer cannot be read: {reason}", hint="use a model with a tokenizer.json") from error
        if not tokenizer.chat_template:
            raise UserError(f"{folder}: no chat template", hint="use the instruct or chat version of this model")
        if not tokenizer.is_fast:
            raise UserError(f"{folder}: only a slow tokenizer", hint="use a model with a tokenizer.json")
        template = cls(tokenizer, _stop_ids(folder, tokenizer))
        try:
            template.encode(PROBE)
        except Refused as refused:
            raise UserError(f"{folder}: chat template cannot be learned from: {refused}", hint="choose another model") from refused
        return template

    @property
    def source(self) -> str:
        """The template itself, for the record."""
        return str(self._tokenizer.chat_template)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of tokenizer and chat template: equal where the same messages give the same tokens."""
        whole = self._special.to_str() + self.source + repr(sorted(self.stop_ids))
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    @staticmethod
    def as_learned(messages: Sequence[Message]) -> list[Message]:
        """Assistant turns without outer blanks: a turn ends at its last fence, and the end-of-turn token follows at once."""
        return [replace(m, content=m.content.strip()) if m.role == "assistant" else m for m in messages]

    def render(self, messages: Sequence[Message], generation_prompt: bool = False, tools: Tools = ()) -> str:
        """The text that a server makes of `messages` and of `tools`, the schemas in OpenAI's format.

        Raises:
            Refused: the template does not take these messages, or the arguments of a call are no JSON object.
        """
        from jinja2 import TemplateError

        # What a template may raise of its own, and what Python raises where it counts or looks something up.
        errors = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError)
        rows, schemas = rows_of(messages), list(tools) or None
        apply = self._tokenizer.apply_chat_template
        try:
            text = apply(rows, tools=schemas, tokenize=False, add_generation_prompt=generation_prompt)
        except errors as error:
            raise Refused(f"the template does not take these messages: {' '.join(str(error).split())}") from error
        return str(text)

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> np.ndarray:
        """int32 [T]: what a server feeds to the model before it answers."""
        text = self.render(messages, True, tools)
        return np.array(self._special.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, special tokens left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def count(self, message: Message) -> int:
        """About how many tokens the message takes in a chat; never fewer than its own."""
        texts = [message.content, *(text for call in message.tool_calls for text in (call.name, call.arguments))]
        own = sum(len(self._plain.encode(text, add_special_tokens=False).ids) for text in texts)
        return own + self._overhead + CALL_OVERHEAD * len(message.tool_calls)

    def count_tools(self, tools: Tools) -> int:
        """How many tokens the schemas add to a chat; 0 where the template writes none."""
        if not tools:
            return 0
        try:
            without, written = (self.render(PROBE[:2], True, schemas) for schemas in ((), tools))
        except Refused:
            return 0  # whatever it is, each window meets it and says so
        with_schemas, alone = (len(self._special.encode(text, add_special_tokens=False).ids) for text in (written, without))
        return max(with_schemas - alone, 0)

    def encode(self, messages: Sequence[Message], tools: Tools = ()) -> Encoded:
        """Tokens and loss weights: every assistant message with its end-of-turn token, and nothing else.

        The tool calls of a message are a part of it. What stands for a redacted secret is read but not learned.

        Raises:
            Refused: the template loses or rewrites text, or a turn's edge falls inside a token.
        """
        messages = self.as_learned(messages)
        text, spans = locate(lambda each: self.render(each, tools=tools), messages)
        self._check_no_control_token([call for message in messages for call in message.tool_calls], tools)
        tokens = self._tokenize(text, [span for span in spans if span and self._names_control_token(text[span.start : span.end])])
        weights = np.zeros(len(tokens.ids), np.float32)
        learned = self._learned(messages, tools, text, spans)
        placeholders = 0
        for index, turn in learned.items():
            weights[tokens.between(turn.start, turn.end)] = messages[index].weight
            for placeholder in PLACEHOLDER.finditer(text, turn.start, turn.end):
                hidden = tokens.touching(*placeholder.span())
                placeholders += int((weights[hidden] > 0).sum())
                weights[hidden] = 0
        endings = sorted({turn.ending for turn in learned.values()})
        if len(endings) > 1:
            raise Refused(f"the template ends assistant turns in different ways: {' '.join(endings)}")
        if weights[:1].any():
            raise Refused("nothing stands before the first turn")
        served = self._served(messages, tools, text, tokens, {index: turn.start for index, turn in learned.items()})
        return Encoded(tokens.ids, weights, tuple(learned), served, placeholders)

    def _learned(self, messages: Sequence[Message], tools: Tools, text: str, spans: Sequence[Span | None]) -> dict[int, _Turn]:
        """Where each learned message stands; calls of the others are looked at too, for a dropped one would mislead."""
        turns: dict[int, _Turn] = {}
        for index, (message, span) in enumerate(zip(messages, spans, strict=True)):
            if message.role == "assistant" and (message.tool_calls or (span and message.weight > 0)):
                plain = span if not message.tool_calls else None
                turn = self._turn(text, plain) if plain else self._turn_with_calls(messages, index, text, span, tools)
                turns |= {index: turn} if message.weight > 0 else {}
        return turns

    def _served(self, messages: Sequence[Message], tools: Tools, text: str, tokens: "_Tokens", starts: Mapping[int, int]) -> int:
        """How many of the turns a server would be asked for with the very tokens that stand before them here."""
        control = np.flatnonzero(np.isin(tokens.ids, self._special_ids))
        served = 0
        for index, start in starts.items():
            if any(place < start for place in tokens.kept_as_text) or not self._is_prompt(messages[:index], tools, text[:start]):
                continue
            count = int(np.searchsorted(tokens.starts, start))
            # Whole words before a control token do not depend on what follows it: the last stretch is enough.
            first = int(control[np.searchsorted(control, count) - 1]) if control.size and control[0] < count else 0
            stretch = self._special.encode(text[tokens.starts[first] : start], add_special_tokens=False).ids
            served += stretch == tokens.ids[first:count].tolist()
        return served

    def _is_prompt(self, messages: Sequence[Message], tools: Tools, before: str) -> bool:
        try:
            return bool(messages) and self.render(messages, True, tools) == before
        except Refused:
            return False

    def _turn_with_calls(self, messages: Sequence[Message], index: int, text: str, span: Span | None, tools: Tools) -> _Turn:
        """A turn with native calls: all that the template writes between the prompt for it and its end-of-turn token."""
        before, through = self.render(messages[:index], True, tools), self.render(messages[: index + 1], tools=tools).rstrip()
        if not text.startswith(before):
            raise Refused("the template writes what stands before a tool call in another way than a server would")
        # Not `through` itself: some templates (Qwen3) write the last turn of all in another way than this one.
        ending = next((special for special in self._endings if through.endswith(special)), None)
        start = len(before)
        end = text.find(ending, max(start, span.end if span else 0)) if ending else -1
        if ending is None or end < 0:
            raise Refused(NO_END)
        if span and span.start < start:
            raise Refused("the template writes the text of a message with a tool call outside of its turn")
        written = text[start:end] if not span else text[start : span.start] + text[span.end : end]
        check_written(messages[index].tool_calls, written)
        return _Turn(start, end, ending)

    @cached_property
    def _endings(self) -> list[str]:
        """The control tokens that may end a turn: those that a server stops at, and the one behind a turn of text."""
        text, spans = locate(self.render, PROBE)
        of_text = {self._turn(text, s).ending for m, s in zip(PROBE, spans, strict=True) if s and m.role == "assistant"}
        stops = {str(self._special.id_to_token(i)) for i in self.stop_ids}
        return [special for special in self._special_texts if special in of_text | stops]

    def _check_no_control_token(self, calls: Sequence[ToolCall], tools: Tools) -> None:
        if any(self._names_control_token(text) for text in texts_of(calls, tools)):
            raise Refused("a tool call or schema holds the text of a control token")

    def _turn(self, text: str, span: Span) -> _Turn:
        """A turn of text: from its content to the control token that follows."""
        end = span.end
        while text[end : end + 1].isspace():
            end += 1
        special = next((special for special in self._special_texts if text.startswith(special, end)), None)
        if special is None:
            raise Refused(NO_END)
        return _Turn(span.start, end, special)

    def _names_control_token(self, content: str) -> bool:
        return any(special in content for special in self._special_texts)

    def _tokenize(self, text: str, as_text: Sequence[Span]) -> "_Tokens":
        """Tokens of the rendered chat; in the messages at `as_text` the name of a control token stays text."""
        if as_text and not self._pieces_join:
            raise Refused("a message holds the text of a control token, which this tokenizer cannot keep as text")
        encodings, end = [], 0
        for span in sorted(as_text, key=lambda span: span.start):
            encodings += [
                (self._special.encode(text[end : span.start], add_special_tokens=False), end),
                (self._plain.encode(text[span.start : span.end], add_special_tokens=False), span.start),
            ]
            end = span.end
        encodings.append((self._special.encode(text[end:], add_special_tokens=False), end))
        ids = np.array([i for encoding, _ in encodings for i in encoding.ids], np.int32)
        offsets = [(start + offset, end + offset) for encoding, offset in encodings for start, end in encoding.offsets]
        starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        return _Tokens(ids, starts, ends, tuple(span.start for span in as_text))

    @cached_property
    def _pieces_join(self) -> bool:
        """Whether pieces tokenized one by one give the tokens of the whole (not so where a blank is put before the first word)."""
        whole = self._special.encode("one\ntwo three", add_special_tokens=False).ids
        return whole == [i for p in ("one\n", "two three") for i in self._special.encode(p, add_special_tokens=False).ids]

    @cached_property
    def _overhead(self) -> int:
        """Tokens that the template adds to a message, rounded up."""
        return math.ceil(len(self.encode(PROBE).tokens) / len(PROBE)) + 1


def _stop_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    stops = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    path = folder / "generation_config.json"
    settings = read_json(path) if path.exists() else {}
    eos = settings.get("eos_token_id") if isinstance(settings, dict) else None
    return frozenset(stops | {i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int)})
