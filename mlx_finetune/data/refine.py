"""One conversation on its way into a collection: chosen, judged turn by turn, redacted, counted; or rejected with the reason."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from mlx_finetune.data.clean import reason_in_name, reason_in_shape, without_empty_turns
from mlx_finetune.data.conversation import LEAST_WEIGHT, MOST_WEIGHT, Conversation, Message
from mlx_finetune.data.fingerprint import Fingerprint, fingerprint
from mlx_finetune.data.redact import Rules, redact_conversation, redact_text
from mlx_finetune.data.select import Selection
from mlx_finetune.data.sources import Rejected
from mlx_finetune.data.system_prompt import System, replace_system
from mlx_finetune.data.tags import KEEP
from mlx_finetune.data.tool_calls import to_native
from mlx_finetune.data.turns import TurnRules, judge, reason_to_reject_turns

MARK = re.compile(r"\[REDACTED:([a-z0-9_]+):#([0-9]+)\]")  # a secret, until the whole collection gives it its number
PROMPT = 2000  # characters from which a system message is likely a prompt
ToolCalls = Literal["text", "native"]


@dataclass(frozen=True)
class Settings:
    """Everything that decides what becomes of a conversation; `redaction` None leaves secrets where they are."""

    selection: Selection = field(default_factory=Selection)
    redaction: Rules | None = field(default_factory=Rules)
    turns: TurnRules = field(default_factory=TurnRules)
    system: System = "keep"
    tool_calls: ToolCalls = "text"
    near_duplicates: float | None = 0.7  # the least similarity at which one is dropped; 0 drops none; None looks for none

    def to_json(self) -> dict[str, Any]:
        """As it stands in collect.json."""
        return {
            "selection": self.selection.to_json(),
            "redaction": self.redaction.to_json() if self.redaction else None,
            "modernise": self.turns.modernise,
            "recovery_weight": self.turns.recovery_weight,
            "system": self.system,
            "tool_calls": self.tool_calls,
            "near_duplicates": self.near_duplicates,
        }


@dataclass(frozen=True)
class Refined:
    """A conversation ready to be written. `head` and `body` are the two halves of its line: JSON, the body in UTF-8."""

    name: str
    source: str
    head: str
    body: bytes
    print: Fingerprint
    counts: Counter[str]  # what the report adds up: "turns", "context: declined ...", "characters: user", "secret: jwt" ...
    secrets: tuple[tuple[str, bytes], ...]  # kind and keyed digest, in the order of the numbers in their marks


class _Names:
    """Gives each secret of one conversation a number of its own; the values stay in this process."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._known: dict[bytes, tuple[str, int]] = {}  # digest -> the kind of its first place, its number
        self.counts: Counter[str] = Counter()

    def __call__(self, kind: str, value: str) -> str:
        digest = hashlib.blake2b(value.encode("utf-8", errors="replace"), key=self._key, digest_size=16).digest()
        kind, number = self._known.setdefault(digest, (kind, len(self._known)))
        self.counts[f"secret: {kind}"] += 1
        return f"[REDACTED:{kind}:#{number}]"  # all of it as it stands in JSON too

    @property
    def secrets(self) -> tuple[tuple[str, bytes], ...]:
        """Kind and digest of each, in the order of the numbers."""
        return tuple((kind, digest) for digest, (kind, _) in self._known.items())


def refine(conversation: Conversation, settings: Settings, key: bytes) -> Refined | Rejected:
    """`key`: random bytes of this run, so that the digests of secrets say nothing once it is over."""
    selection = settings.selection
    also = _names_as_written(conversation, settings, key) if selection.tags or selection.exclude else ()
    tag = selection.tag(conversation, also)
    if tag != KEEP and (reason := reason_in_name(conversation)):
        return Rejected(conversation.name, conversation.source, reason, by_tag=True)
    if reason := reason_in_shape(conversation):
        return Rejected(conversation.name, conversation.source, reason)
    if left := selection.leaves(conversation, also):
        return left
    conversation = selection.of_wanted_models(_judged(conversation, settings), tag)
    conversation = _weighted(conversation, 1.0 if tag is None or isinstance(tag, str) else tag)
    if reason := reason_in_shape(conversation):
        return Rejected(conversation.name, conversation.source, reason)
    if tag != KEEP and (reason := reason_to_reject_turns(conversation.messages)):
        return Rejected(conversation.name, conversation.source, reason, by_tag=True)
    names = _Names(key)
    return _refined(_clean(_as_served(conversation, settings), settings, names), settings, names)


def _names_as_written(conversation: Conversation, settings: Settings, key: bytes) -> tuple[str, ...]:
    """Its name and id as the person knows them from tags.yaml."""
    shown = without_secrets(conversation.name, settings.redaction)
    if not settings.selection.names_ids:
        return (shown,)
    return shown, _clean(_as_served(_judged(conversation, settings), settings), settings, _Names(key)).id


def _clean(conversation: Conversation, settings: Settings, names: _Names) -> Conversation:
    return redact_conversation(conversation, settings.redaction, names) if settings.redaction else conversation


def without_secrets(text: str, rules: Rules | None) -> str:
    """A name or a reason as it may be shown; its secrets are not numbered. None: as it is."""
    return redact_text(text, rules, lambda kind, _: kind and f"[REDACTED:{kind}:0]") if rules else text


def _judged(conversation: Conversation, settings: Settings) -> Conversation:
    if conversation.source != "gptme":
        return without_empty_turns(conversation)
    tool_format = str(conversation.meta.get("tool_format") or "markdown")
    tools = frozenset(conversation.meta.get("tools", ()))
    judged = judge(conversation.messages, tool_format, settings.turns, tools)
    return without_empty_turns(replace(conversation, messages=judged))


def _weighted(conversation: Conversation, weight: float) -> Conversation:
    if weight == 1:
        return conversation
    messages = (replace(m, weight=_within(m.weight * weight)) if m.role == "assistant" else m for m in conversation.messages)
    return replace(conversation, messages=tuple(messages))


def _within(weight: float) -> float:
    """What a weight may be, where two were multiplied."""
    return 0.0 if weight == 0 else min(max(weight, LEAST_WEIGHT), MOST_WEIGHT)


def _as_served(conversation: Conversation, settings: Settings) -> Conversation:
    """System prompt and tool calls as the person wants them; meta says what gptme options serve the same."""
    if conversation.source != "gptme":
        return conversation
    meta = dict(conversation.meta)
    lead = next((i for i, m in enumerate(conversation.messages) if m.role != "system"), len(conversation.messages))
    tool_format, model = str(meta.get("tool_format") or "markdown"), str(meta.get("model") or "")
    interactive = bool(meta.get("interactive", True))
    replaced = replace_system(conversation.messages[:lead], settings.system, tool_format, meta.get("tools", ()), interactive, model)
    messages = (*replaced.messages, *conversation.messages[lead:])
    meta["system"] = settings.system if replaced.exact or settings.system == "none" else "keep"
    meta["served_by"] = list(replaced.served_by)
    if not replaced.exact:
        meta["system_not_exact"] = replaced.reason
    if settings.tool_calls == "native" and tool_format == "tool":
        messages = to_native(messages)
        meta["not_reproduced"] = [what for what in meta.get("not_reproduced", ()) if what != "call_id"]
        meta["not_reproduced"] += [] if conversation.tools else ["schemas of the tools"]
    else:
        messages = tuple(replace(m, tool_call_id="") if m.tool_call_id else m for m in messages)
    return replace(conversation, messages=messages, meta={key: value for key, value in meta.items() if value not in ([], "")})


def _refined(conversation: Conversation, settings: Settings, names: _Names) -> Refined:
    head = conversation.head()
    messages = _json_of(conversation.messages)
    tools = f', "tools": {json.dumps(list(conversation.tools), ensure_ascii=False)}'.encode() if conversation.tools else b""
    print_ = fingerprint(conversation, near=settings.near_duplicates is not None)
    return Refined(
        conversation.name,
        conversation.source,
        json.dumps(head, ensure_ascii=False),
        b'"messages": [' + messages + b"]" + tools + b"}",
        print_,
        _counts(conversation) + names.counts,
        names.secrets,
    )


def _json_of(messages: Sequence[Message]) -> bytes:
    """What stands between the brackets; most logs begin with prompts that another one has."""
    lead = next((i for i, m in enumerate(messages) if m.role != "system" or len(m.content) < PROMPT), len(messages))
    rest = json.dumps([message.to_json() for message in messages[lead:]], ensure_ascii=False)[1:-1].encode()
    return b", ".join([*map(_json_of_prompt, messages[:lead]), *([rest] if rest else [])])


@lru_cache(maxsize=64)
def _json_of_prompt(message: Message) -> bytes:
    return json.dumps(message.to_json(), ensure_ascii=False).encode()


def _counts(conversation: Conversation) -> Counter[str]:
    counts: Counter[str] = Counter()
    for message in conversation.messages:
        counts[f"characters: {message.role}"] += len(message.content) + sum(len(c.arguments) for c in message.tool_calls)
        if message.role == "assistant" and message.weight > 0:
            counts["turns"] += 1
            counts["recoveries"] += message.reason == "recovers"
        elif message.role == "assistant":
            counts[f"context: {message.reason or 'weight 0'}"] += 1
    if prompt := conversation.meta.get("system"):
        why = conversation.meta.get("system_not_exact")
        counts[f"prompt: {prompt}" + (f", {why}" if why else "")] += 1
    if served_by := conversation.meta.get("served_by"):
        counts[f"served by: {' '.join(served_by)}"] += 1
    counts[f"format: {conversation.meta.get('tool_format') or conversation.meta.get('format') or 'no tool calls'}"] += 1
    return counts
