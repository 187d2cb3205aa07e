"""The model's own chat template and tokenizer: a conversation becomes tokens, and each learned token is known by its place."""

import hashlib
import math
from collections.abc import Sequence
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
    served: int  # how many of them stand after exactly the text that a server would send


class ChatTemplate:
    """Renders and tokenizes; build it with `ChatTemplate.load`."""

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int]) -> None:
        """`tokenizer`: a fast tokenizer of transformers with a chat template; `stop_ids`: where a server stops."""
        from tokenizers import Tokenizer

        self._tokenizer = tokenizer
        self.stop_ids = stop_ids
        backend = tokenizer.backend_tokenizer.to_str()
        self._special, self._plain = Tokenizer.from_str(backend), Tokenizer.from_str(backend)
        self._plain.encode_special_tokens = True  # a literal <|im_end|> in a message stays text
        for backend in (self._special, self._plain):
            backend.no_truncation()
            backend.no_padding()
        added = self._special.get_added_tokens_decoder().values()
        self._special_texts = sorted((t.content for t in added if t.special), key=len, reverse=True)

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

        rows = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=generation_prompt)
        except TemplateError as error:
            raise Refused(f"the template does not take these roles: {error}") from error
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
        tokens, starts, ends = self._tokenize(text, [span for span in spans if span])
        weights = np.zeros(len(tokens), np.float32)
        turns, served = [], 0
        for index, (message, span) in enumerate(zip(messages, spans, strict=True)):
            if message.role != "assistant" or message.weight == 0 or span is None:
                continue
            turn = self._with_end_of_turn(text, span)
            inside = (starts >= turn.start) & (ends > turn.start) & (ends <= turn.end)
            if np.any((starts < turn.start) & (ends > turn.start)) or np.any((starts < turn.end) & (ends > turn.end)):
                raise Refused("a token straddles the edge of a turn")
            weights[inside] = message.weight
            turns.append(index)
            served += self._is_served(messages[:index], text[: turn.start])
        return Encoded(tokens, weights, tuple(turns), served)

    def _is_served(self, messages: Sequence[Message], before: str) -> bool:
        try:
            return bool(messages) and self.render(messages, True) == before
        except Refused:
            return False

    def _with_end_of_turn(self, text: str, span: Span) -> Span:
        end = span.end + len(text[span.end :]) - len(text[span.end :].lstrip())
        for special in self._special_texts:
            if text.startswith(special, end):
                return Span(span.start, end + len(special))
        raise Refused("no end-of-turn token follows an assistant message: the model would not learn to stop")

    def _tokenize(self, text: str, contents: Sequence[Span]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids, and for each the first character and the end: int arrays [T]."""
        if not any(special in text[span.start : span.end] for span in contents for special in self._special_texts):
            return _arrays([(self._special.encode(text, add_special_tokens=False), 0)])
        if not self._pieces_join:
            raise Refused("a message holds the text of a special token, which this tokenizer cannot keep as text")
        encodings, end = [], 0
        for span in contents:
            encodings += [
                (self._special.encode(text[end : span.start], add_special_tokens=False), end),
                (self._plain.encode(text[span.start : span.end], add_special_tokens=False), span.start),
            ]
            end = span.end
        return _arrays([*encodings, (self._special.encode(text[end:], add_special_tokens=False), end)])

    @cached_property
    def _pieces_join(self) -> bool:
        """Whether pieces tokenized one by one give the tokens of the whole (not so where a blank is put before the first word)."""
        whole = self._special.encode("one\ntwo three", add_special_tokens=False).ids
        return whole == [i for p in ("one\n", "two three") for i in self._special.encode(p, add_special_tokens=False).ids]

    @cached_property
    def _overhead(self) -> int:
        """Tokens that the template adds to a message, rounded up."""
        return math.ceil(len(self.encode(PROBE).tokens) / len(PROBE)) + 1


def _arrays(encodings: Sequence[tuple[Any, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens = np.array([i for encoding, _ in encodings for i in encoding.ids], np.int32)
    offsets = [(start + offset, end + offset) for encoding, offset in encodings for start, end in encoding.offsets]
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    return tokens, starts, ends


def _stop_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    stops = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    path = folder / "generation_config.json"
    eos = read_json(path).get("eos_token_id") if path.exists() else None
    return frozenset(stops | (set(eos) if isinstance(eos, list) else {eos} if eos is not None else set()))
