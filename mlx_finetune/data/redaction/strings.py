"""Every text of a conversation, rewritten by a function; JSON is decoded first and written anew only where a string changes."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mlx_finetune.data.conversation import Conversation, Message, ToolCall
from mlx_finetune.data.native import NativeCall, native_calls

STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
COLON = re.compile(r"[ \t\r\n]*:")

NOT_JSON = object()

Rewrite = Callable[[str, str], str]  # (text, name of the field that it is the value of, "" for none) -> text


class Pairs(list[tuple[str, Any]]):
    """The keys and values of a JSON object."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key on its way to be read."""

    name: str


def texts_of(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Each text and the name of its field, as `rewritten` hands them to its function, in the same order."""
    for message in conversation.messages:
        end = 0
        for call in _calls(message.content):
            yield message.content[end : call.json_start], ""
            yield from _texts_of_json(message.content[call.json_start : call.end])
            end = call.end
        yield message.content[end:], ""
        for one in message.tool_calls:
            yield from _texts_of_json(one.arguments)
            yield one.id, ""
        for text in filter(None, (message.reason, message.tool_call_id)):
            yield text, ""
    yield from texts_in(conversation.tools)
    for key, value in conversation.meta.items():
        yield from texts_in({key: value})
    yield conversation.group, ""
    yield conversation.license, ""


def rewritten(conversation: Conversation, rewrite: Rewrite) -> Conversation:
    """Content, calls and ids of every message in order, then the schemas of tools, then meta, group and licence."""
    messages = tuple(_message(message, rewrite) for message in conversation.messages)
    tools = tuple(_value(conversation.tools, rewrite))
    meta: dict[str, Any] = {}
    for key, value in conversation.meta.items():
        meta |= _value({key: value}, rewrite)
    group, license_ = rewrite(conversation.group, ""), rewrite(conversation.license, "")
    return replace(conversation, messages=messages, tools=tools, meta=meta, group=group, license=license_)


def _message(message: Message, rewrite: Rewrite) -> Message:
    content = _content(message.content, rewrite)
    calls = tuple(_call(call, rewrite) for call in message.tool_calls)
    reason, answers = (rewrite(text, "") if text else "" for text in (message.reason, message.tool_call_id))
    if (content, calls, reason, answers) == (message.content, message.tool_calls, message.reason, message.tool_call_id):
        return message
    return replace(message, content=content, tool_calls=calls, reason=reason, tool_call_id=answers)


def _call(call: ToolCall, rewrite: Rewrite) -> ToolCall:
    arguments = _json_or_text(call.arguments, rewrite)
    return ToolCall(rewrite(call.id, ""), call.name, arguments)


def _calls(text: str) -> Iterable[NativeCall]:
    """The native calls; a text without one, as most are, is not searched with an expression."""
    return native_calls(text) if text.startswith("@") or "\n@" in text else ()


def _content(text: str, rewrite: Rewrite) -> str:
    """Text, with the arguments of gptme's native calls as JSON."""
    parts, end = [], 0
    for call in _calls(text):
        parts += [rewrite(text[end : call.json_start], ""), _json_or_text(text[call.json_start : call.end], rewrite)]
        end = call.end
    return "".join([*parts, rewrite(text[end:], "")])


def _json_or_text(text: str, rewrite: Rewrite) -> str:
    return rewrite(text, "") if _decoded(text) is NOT_JSON else _json(text, rewrite)


def _texts_of_json(text: str) -> Iterator[tuple[str, str]]:
    value = _decoded(text)
    return iter([(text, "")]) if value is NOT_JSON else texts_in(value)


def _decoded(text: str) -> Any:
    """The value, its objects as Pairs, so that a key which stands there twice is seen twice."""
    try:
        return json.loads(text, object_pairs_hook=Pairs)
    except (ValueError, RecursionError):
        return NOT_JSON


def _json(text: str, rewrite: Rewrite) -> str:
    """JSON with its strings rewritten, each in its place: numbers, blanks and the order of keys stay as they were written."""
    parts, end, field = [], 0, ""
    for match in STRING.finditer(text):
        string = json.loads(match[0], strict=False) if "\\" in match[0] else match[0][1:-1]
        is_key = COLON.match(text, match.end()) is not None
        new = rewrite(string, "" if is_key else field)
        if is_key:
            field = string
        if new != string:
            parts += [text[end : match.start()], json.dumps(new, ensure_ascii=match[0].isascii())]
            end = match.end()
    return "".join([*parts, text[end:]])


def _value(value: Any, rewrite: Rewrite) -> Any:
    """Of plain values, by way of JSON text where something changes: so depth is no matter."""
    if all(rewrite(text, field) == text for text, field in texts_in(value)):
        return value
    return json.loads(_json(json.dumps(value), rewrite))


def texts_in(value: Any) -> Iterator[tuple[str, str]]:
    """Strings in the order of JSON text, each with the key that was read last; keys are texts themselves."""
    field, waiting = "", [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value, field
        elif isinstance(value, Key):
            field = value.name
            yield field, ""
        elif isinstance(value, dict | Pairs):
            for key, inner in reversed(value.items() if isinstance(value, dict) else value):
                waiting += [inner, Key(key if isinstance(key, str) else json.dumps(key))]
        elif isinstance(value, list | tuple):
            waiting.extend(reversed(value))
