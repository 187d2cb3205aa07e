"""The model's own chat template and tokenizer: a conversation becomes tokens, and each learned token is known by its place."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from mlx_finetune.data.bounds import in_bounds
from mlx_finetune.data.conversation import Message
from mlx_finetune.data.emission import Ends, Tools, ends_of
from mlx_finetune.data.encoding import Encoded, encode, encode_turn
from mlx_finetune.data.jinja import compiled
from mlx_finetune.data.oddities import oddities
from mlx_finetune.data.open_tokenizer import of_tokenizers, open_tokenizer, stop_ids
from mlx_finetune.data.policies import POLICIES, Policy, policy_of, with_dates
from mlx_finetune.data.probing import PROBE, check_asked, chosen, native_oddities, native_refusal
from mlx_finetune.data.provenance import Refused, locate
from mlx_finetune.data.rows import rows_of
from mlx_finetune.data.segments import Segments
from mlx_finetune.data.token_text import texts_of_tokens
from mlx_finetune.errors import UserError

CALL_OVERHEAD = 24  # tokens that a template adds to a call, about: its tags and the names of its fields
SHORT, MOST_PROMPTS = 100, 1000  # characters of a prompt, and prompts, that are remembered
GENERATION = re.compile(r"\{%-?\s*generation\b")


class ChatTemplate:
    """Renders and tokenizes; build it with `ChatTemplate.load`."""

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int], policy: Policy = POLICIES[0]) -> None:
        """`tokenizer`: a fast tokenizer of transformers with a chat template; `stop_ids`: where a server stops."""
        from tokenizers import Tokenizer

        self._tokenizer, self._jinja = tokenizer, tokenizer.get_chat_template()
        self._variables = tokenizer.special_tokens_map  # which templates name: bos_token and others
        self._another_for_tools = isinstance(tokenizer.chat_template, dict) and "tool_use" in tokenizer.chat_template
        self.stop_ids = stop_ids
        self.policy, self.why = policy, ""  # what the template does to roles, and why
        # Its post-processor could only add tokens that the template writes itself, or trim the offsets that masks rest on.
        backend = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": None})
        self.special, self.plain = Tokenizer.from_str(backend), Tokenizer.from_str(backend)
        self.plain.encode_special_tokens = True  # a literal <|im_end|> in a message stays text
        for encoder in (self.special, self.plain):
            encoder.no_truncation()
            encoder.no_padding()
        control = {i: token for i, token in self.special.get_added_tokens_decoder().items() if token.special}
        self.special_ids = list(control)
        self.special_texts = sorted((token.content for token in control.values()), key=len, reverse=True)
        self.stop_texts = tuple(text for text in self.special_texts if self.special.token_to_id(text) in stop_ids)
        self.segments = Segments(self.special, self.plain, control)
        self._prompts: dict[str, list[int]] = {}  # tokens of the short ones, which come again with every turn
        self._sizes: dict[str, int] = {}  # tokens of contents in the chat that is looked at

    def __getstate__(self) -> dict[str, Any]:
        """For a helper process, which renders and encodes: without transformers' tokenizer, which takes seconds to import."""
        return {name: value for name, value in vars(self).items() if name != "_tokenizer"}

    @classmethod
    def load(cls, folder: Path, served: str = "") -> "ChatTemplate":
        """Reads tokenizer and chat template of a model folder; no code from the folder is run.

        `served` is the template of an earlier `load`, `source`, which stays in force. Without it the first policy is chosen with
        which the model's own neither raises nor loses text of a chat as gptme sends it, and its dates are those of now.

        Raises:
            UserError: there is no tokenizer or no chat template, or it is one that cannot be learned from exactly.
        """
        tokenizer = open_tokenizer(folder)
        stops = stop_ids(folder, tokenizer)
        if served:
            name = policy_of(served)
            return cls(tokenizer, stops).with_source(served, next((one for one in POLICIES if one.name == name), POLICIES[0]))
        with of_tokenizers(folder):
            first = cls(tokenizer, stops)
        own = with_dates(first.source, datetime.now().astimezone())
        with in_bounds(str(folder)):
            template = chosen(first, own)
            refusal = template.refusal_of(PROBE)
        if refusal:
            raise UserError(f"{folder}: chat template cannot be learned from: {refusal}", hint="choose another model")
        return template

    def with_source(self, source: str, policy: Policy) -> "ChatTemplate":
        """The same tokenizer with another template."""
        other = object.__new__(ChatTemplate)
        found = ("fingerprint", "oddities", "ends", "pieces_join", "native_refusal", "_overhead")  # of the first alone
        vars(other).update({name: value for name, value in vars(self).items() if name not in found})
        other._jinja, other.policy = source, policy
        return other

    def refusal_of(self, messages: Sequence[Message]) -> str:
        """Why these messages cannot be learned from, neither in one rendering nor turn by turn; empty where they can."""
        try:
            self.encode(messages)
        except Refused as refused:
            reason = str(refused)
        else:
            return ""
        try:
            for place, message in enumerate(messages):
                if message.role == "assistant":
                    self.encode_turn(messages[: place + 1])
        except Refused:
            return reason
        return ""

    def misplaces(self, messages: Sequence[Message]) -> str:
        """Which message stands in front of an earlier one in the prompt for the last; empty where all stand in their order."""
        try:
            _, spans = locate(lambda each: self.render(each, True), messages[:-1], lenient=True)
        except Refused as refused:
            return str(refused)
        last = 0
        for message, span in zip(messages, spans, strict=False):
            if span and span.start < last:
                return f"the template puts a message of role {message.role} in front of an earlier one"
            last = span.start if span else last
        return ""

    @property
    def source(self) -> str:
        """The template itself, for the record."""
        return str(self._jinja)

    def to_json(self) -> dict[str, Any]:
        """As it stands in dataset.json."""
        policy = {"name": self.policy.name, "what": self.policy.what, "why": self.why}
        return {"chat_template": self.source, "role_policy": policy, "template_oddities": list(self.oddities)}

    @property
    def remarks(self) -> list[str]:
        """What a person should know of it, a line each."""
        lines = [f"roles {self.policy.name}: {self.policy.what}"] if self.policy.jinja else []
        return lines + ([f"  {self.why}"] if self.why else []) + list(self.oddities)

    @cached_property
    def oddities(self) -> tuple[str, ...]:
        """What the template does that a person would not expect."""
        found = list(oddities(self.render, self.source, self._tokenizer.pad_token_id in self.stop_ids))
        if not self.ends.stops:
            found.append(
                f"the chat template ends turns with {self.ends.tokens[0]}, at which no server stops by generation_config.json"
            )
        if self.ends.missing:
            found.append(f"the chat template leaves the last turn open, which is learned with {self.ends.missing} as its end")
        if GENERATION.search(self.source) and not self._markers_agree():
            found.append(
                "the chat template marks other tokens with {% generation %} than turns and their ends, which are learned here"
            )
        return (*found, *native_oddities(self))

    @cached_property
    def native_refusal(self) -> str:
        """Why no chat with native tool calls can be learned from; empty where the template writes them."""
        return native_refusal(self)

    def _markers_agree(self) -> bool:
        """Whether the template's own marks of what a model writes are the tokens that are learned."""
        marked = self._tokenizer.apply_chat_template(
            rows_of(PROBE), chat_template=self._jinja, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        try:
            encoded = self.encode(PROBE)
        except Refused:
            return True  # turns are learned one by one, in contexts that the template's marks say nothing of
        learned = [*zip(encoded.tokens.tolist(), (encoded.weights > 0).tolist(), strict=True)]
        return learned == [*zip(marked["input_ids"], map(bool, marked["assistant_masks"]), strict=True)]

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of tokenizer and chat template: equal where the same messages give the same tokens."""
        whole = self.special.to_str() + self.source + repr(sorted(self.stop_ids))
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
        return self.render_rows(rows_of(messages), generation_prompt, tools)

    def render_rows(self, rows: Sequence[Mapping[str, Any]], generation_prompt: bool = False, tools: Tools = ()) -> str:
        """As `render`, of rows as `rows_of` makes them."""
        # What a template may raise of its own, and what Python raises where it counts or looks something up.
        errors = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError, MemoryError)
        if tools and self._another_for_tools:
            raise Refused("the model has another chat template for tools")
        if not rows:
            raise Refused("no messages to render")
        given = {"messages": list(rows), "tools": list(tools) or None, "documents": None}
        try:
            return compiled(self._jinja).render(given, add_generation_prompt=generation_prompt, **self._variables)
        except errors as error:
            raise Refused(f"the template does not take these messages: {' '.join(str(error).split())}") from error

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> np.ndarray:
        """int32 [T]: what a server feeds to the model before it answers."""
        text = self.render(messages, True, tools)
        return np.array(self.special.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, special tokens left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Text of each token, control tokens too, which join to the text of all; a split character stands at its last token."""
        return texts_of_tokens(lambda ids: str(self.special.decode(ids, skip_special_tokens=False)), tokens)

    def count(self, message: Message) -> int:
        """About how many tokens the message takes in a chat; of one that `look_ahead` met, what it takes in that."""
        own = self._sizes.get(message.content)
        texts = [text for call in message.tool_calls for text in (call.name, call.arguments)]
        tokens = self.segments.count(texts if own is not None else [message.content, *texts])
        return (own or 0) + tokens + self._overhead + CALL_OVERHEAD * len(message.tool_calls)

    def look_ahead(self, messages: Sequence[Message], tools: Tools = ()) -> None:
        """Renders and tokenizes a whole chat, for `count`; its parts are then known to `encode` too."""
        self._sizes = {}
        try:
            text = self.render(self.as_learned(messages), tools=tools)
        except Refused:
            return
        _, starts, ends = self.segments.look_ahead(text)
        place = 0
        for message in messages:
            content = message.content.strip() if message.role == "assistant" else message.content
            if content and (found := text.find(content, place)) >= 0:
                place = found + len(content)
                self._sizes[message.content] = int(np.searchsorted(starts, place) - np.searchsorted(ends, found, "right"))

    def count_tools(self, tools: Tools) -> int:
        """How many tokens the schemas add to a chat; 0 where the template writes none."""
        if not tools:
            return 0
        try:
            without, written = (self.render(PROBE[:2], True, schemas) for schemas in ((), tools))
        except Refused:
            return 0  # whatever it is, each window meets it and says so
        with_schemas, alone = (len(self.special.encode(text, add_special_tokens=False).ids) for text in (written, without))
        return max(with_schemas - alone, 0)

    def encode(self, messages: Sequence[Message], tools: Tools = ()) -> Encoded:
        """Tokens and loss weights of one rendering: see `encoding.encode`."""
        check_asked(self, messages)
        return encode(self, messages, tools)

    def encode_turn(self, messages: Sequence[Message], tools: Tools = ()) -> Encoded:
        """The last message behind the very tokens that a server feeds before it: see `encoding.encode_turn`."""
        check_asked(self, messages)
        return encode_turn(self, messages, tools)

    def prompt_tokens(self, text: str) -> list[int]:
        """What a server makes of a rendered text."""
        if len(text) > SHORT:
            return list(self.segments.encode(text)[0].tolist())
        if text not in self._prompts:
            if len(self._prompts) > MOST_PROMPTS:
                self._prompts.clear()
            self._prompts[text] = list(self.segments.encode(text)[0].tolist())
        return self._prompts[text]

    @cached_property
    def ends(self) -> Ends:
        """How turns end: see `emission.ends_of`."""
        return ends_of(self)

    @property
    def end_ids(self) -> frozenset[int]:
        """The control tokens that end a turn: servers stop at them where `ends.stops` is true."""
        return frozenset(i for text in self.ends.tokens if (i := self.special.token_to_id(text)) is not None)

    def names_control_token(self, content: str) -> bool:
        return any(special in content for special in self.special_texts)

    @cached_property
    def pieces_join(self) -> bool:
        """Whether pieces tokenized one by one give the tokens of the whole (not so where a blank is put before the first word)."""
        whole = self.special.encode("one\ntwo three", add_special_tokens=False).ids
        return whole == [i for p in ("one\n", "two three") for i in self.special.encode(p, add_special_tokens=False).ids]

    @cached_property
    def _overhead(self) -> int:
        """Tokens that the template adds to a message, rounded up."""
        return math.ceil(len(self.prompt_tokens(self.render(PROBE))) / len(PROBE)) + 1
