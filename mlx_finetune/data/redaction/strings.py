"""Every text of a conversation, rewritten by a function; JSON is decoded first and written anew only where a string changes."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlx_finetune.data.conversation import Conversation, Message, ToolCall
from mlx_finetune.data.native import native_calls

STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
COLON = re.compile(r"[ \t\r\n]*:")
UNTOUCHED_META = ("name", "group", "id")  # what other files refer to

Rewrite = Callable[[str, str], str]  # (text, name of the field that it is the value of, "" for none) -> text


def rewritten(conversation: Conversation, rewrite: Rewrite) -> Conversation:
    """Content and arguments of every message in order, then the schemas of tools, then meta (but its name, group and id)."""
    messages = tuple(_message(message, rewrite) for message in conversation.messages)
    tools = _value(list(conversation.tools), rewrite)
    meta = {key: value if key in UNTOUCHED_META else _value({key: value}, rewrite)[key] for key, value in conversation.meta.items()}
    return replace(conversation, messages=messages, tools=tuple(tools), meta=meta)


def _message(message: Message, rewrite: Rewrite) -> Message:
    content = _content(message.content, rewrite)
    calls = tuple(_call(call, rewrite) for call in message.tool_calls)
    if content == message.content and calls == message.tool_calls:
        return message
    return replace(message, content=content, tool_calls=calls)


def _call(call: ToolCall, rewrite: Rewrite) -> ToolCall:
    return replace(call, arguments=_json_or_text(call.arguments, rewrite))


def _content(text: str, rewrite: Rewrite) -> str:
    """Text, with the arguments of gptme's native calls as JSON."""
    parts, end = [], 0
    for call in native_calls(text) if "@" in text else ():
        parts += [rewrite(text[end : call.json_start], ""), _json_or_text(text[call.json_start : call.end], rewrite)]
        end = call.end
    return "".join([*parts, rewrite(text[end:], "")])


def _json_or_text(text: str, rewrite: Rewrite) -> str:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return rewrite(text, "")
    return _json(text, rewrite)


def _json(text: str, rewrite: Rewrite) -> str:
    """JSON with its strings rewritten, each in its place: numbers, blanks and the order of keys stay as they were written."""
    parts, end, field = [], 0, ""
    for match in STRING.finditer(text):
        string = json.loads(match[0], strict=False)
        is_key = COLON.match(text, match.end()) is not None
        new = rewrite(string, "" if is_key else field)
        if is_key:
            field = string
        if new != string:
            parts += [text[end : match.start()], json.dumps(new, ensure_ascii=match[0].isascii())]
            end = match.end()
    return "".join([*parts, text[end:]])


def _value(value: Any, rewrite: Rewrite) -> Any:
    """Of plain values, by way of JSON text: so depth is no matter."""
    text = json.dumps(value)
    new = _json(text, rewrite)
    return value if new == text else json.loads(new)
