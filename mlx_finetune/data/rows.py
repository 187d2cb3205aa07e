"""Messages as Hugging Face's chat templates take them, with native tool calls, and whether a template wrote a call whole."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_finetune.data.conversation import Message, ToolCall
from mlx_finetune.data.provenance import Refused

DROPPED = "the template drops a tool call, or a part of one"


def rows_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A row for each message as a server hands it on: `arguments` decoded, for templates write them as JSON themselves.

    Raises:
        Refused: the arguments of a call are no JSON object.
    """
    rows: list[dict[str, Any]] = []
    for message in messages:
        row: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            row["tool_calls"] = [_call(call) for call in message.tool_calls]
        if message.tool_call_id:
            row["tool_call_id"] = message.tool_call_id  # and no name of the function: gptme sends none
        rows.append(row)
    return rows


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments_of(call)}}


def arguments_of(call: ToolCall) -> dict[str, Any]:
    """The arguments decoded; none at all may be written as no text.

    Raises:
        Refused: they are no JSON object.
    """
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise Refused("the arguments of a tool call are not JSON") from error
    if not isinstance(arguments, dict):
        raise Refused("the arguments of a tool call are no JSON object")
    return arguments


def check_written(calls: Sequence[ToolCall], written: str) -> None:
    """Looks for the name and each argument of each call in the text of a turn, as often as the calls hold it.

    An argument may stand there as it is or as JSON writes it, with or without escapes for what is not ASCII.

    Raises:
        Refused: one is not there.
    """
    for text, count in Counter(text for call in calls for text in (call.name, *_leaves(arguments_of(call)))).items():
        if max(written.count(form) for form in _forms(text)) < count:
            raise Refused(DROPPED)


def texts_of(calls: Sequence[ToolCall], tools: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Every text that a template may write of calls and schemas, decoded."""
    for call in calls:
        yield from (call.id, call.name, *_leaves(arguments_of(call)))
    yield from _leaves(list(tools))


def _leaves(value: Any) -> Iterator[str]:
    """Names and values inside of a JSON value, as text, in no order."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict):
            yield from inner
            waiting += inner.values()
        elif isinstance(inner, list):
            waiting += inner
        else:
            yield inner if isinstance(inner, str) else json.dumps(inner)


def _forms(text: str) -> set[str]:
    python = {"true": "True", "false": "False", "null": "None"}  # as Jinja writes such a value
    return {text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1], python.get(text, text)}
