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

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.provenance import Refused, Span, locate
from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json

PROBE = (Message("system", "S"), Message("user", "U"), Message("assistant", "A"), Message("user", "V"), Message("assistant", "B"))


@dataclass(frozen=True)
class Encoded:
    """Tokens of a rendered chat; `weights[i]` is how much predicting `tokens[i]` counts."""

    tokens: np.ndarray  # int32 [T]
    weights: np.ndarray  # float32 [T]
    turns: tuple[int, ...]  # indices of the messages that are learned
    served: int  # how many of them stand after exactly the tokens that a server would feed


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

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """The text that a server makes of `messages`.

        Raises:
            Refused: the template does not take these messages.
        """
        from jinja2 import TemplateError

        # What a template may raise of its own, and what Python raises where it counts or looks something up.
        errors = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError)
        rows = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=generation_prompt)
        except errors as error:
            raise Refused(f"the template does not take these messages: {' '.join(str(error).split())}") from error
        return str(text)

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """int32 [T]: what a server feeds to the model before it answers."""
        return np.array(self._special.encode(self.render(messages, True), add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, special tokens left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def count(self, message: Message) -> int:
        """About how many tokens the message takes in a chat; never fewer than its own."""
        return len(self._plain.encode(message.content, add_special_tokens=False).ids) + self._overhead

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Tokens and loss weights: every assistant message with its end-of-turn token, and nothing else.

        Raises:
            Refused: the template loses or rewrites text, or a turn's edge falls inside a token.
        """
        messages = self.as_learned(messages)
        text, spans = locate(self.render, messages)
        tokens = self._tokenize(text, [span for span in spans if span and self._names_control_token(text[span.start : span.end])])
        weights = np.zeros(len(tokens.ids), np.float32)
        starts: dict[int, int] = {}  # of the learned messages, in characters
        endings = set()
        for index, (message, span) in enumerate(zip(messages, spans, strict=True)):
            if message.role == "assistant" and message.weight > 0 and span:
                end, special = self._end_of_turn(text, span)
                weights[tokens.between(span.start, end)] = message.weight
                starts[index] = span.start
                endings.add(special)
        if len(endings) > 1:
            raise Refused(f"the template ends assistant turns in different ways: {' '.join(sorted(endings))}")
        if weights[:1].any():
            raise Refused("nothing stands before the first turn")
        return Encoded(tokens.ids, weights, tuple(starts), self._served(messages, text, tokens, starts))

    def _served(self, messages: Sequence[Message], text: str, tokens: "_Tokens", starts: Mapping[int, int]) -> int:
        """How many of the turns a server would be asked for with the very tokens that stand before them here."""
        control = np.flatnonzero(np.isin(tokens.ids, self._special_ids))
        served = 0
        for index, start in starts.items():
            if any(place < start for place in tokens.kept_as_text) or not self._is_prompt(messages[:index], text[:start]):
                continue
            count = int(np.searchsorted(tokens.starts, start))
            # Whole words before a control token do not depend on what follows it: the last stretch is enough.
            first = int(control[np.searchsorted(control, count) - 1]) if control.size and control[0] < count else 0
            stretch = self._special.encode(text[tokens.starts[first] : start], add_special_tokens=False).ids
            served += stretch == tokens.ids[first:count].tolist()
        return served

    def _is_prompt(self, messages: Sequence[Message], before: str) -> bool:
        try:
            return bool(messages) and self.render(messages, True) == before
        except Refused:
            return False

    def _end_of_turn(self, text: str, span: Span) -> tuple[int, str]:
        """Where the control token starts that ends the turn, and its text."""
        start = span.end
        while text[start : start + 1].isspace():
            start += 1
        special = next((special for special in self._special_texts if text.startswith(special, start)), None)
        if special is None:
            raise Refused("no end-of-turn token follows an assistant message: the model would not learn to stop")
        return start, special

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
