"""The messages of chat files, whoever wrote them, as ours: roles, content, weights, tool calls and the results that answer them.

Sources: OpenAI's chat completions and fine-tuning formats (messages, tools, `weight`; `functions`, `function_call` and the role
`function` before 2023-11), ShareGPT as LLaMA-Factory documents it (`from`, `value`, `function_call`, `observation`).
"""

import json
import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from mlx_finetune.data.conversation import LEAST_WEIGHT, MOST_WEIGHT, Message, Role, ToolCall
from mlx_finetune.data.sources import printable
from mlx_finetune.data.sources.chat_values import CannotLearn, RowError, listed, named, parsed, shown, tidy

OTHER_NAMES: dict[Role, str] = {
    "system": "system developer",
    "user": "user human instruction",
    "assistant": "assistant gpt chatgpt bing bard model bot ai response function_call",
    "tool": "tool function observation function_response tool_response ipython",
}
ROLES: dict[str, Role] = {name: role for role, names in OTHER_NAMES.items() for name in names.split()}
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # type of a part: its field
LONGEST_SHOWN = 44  # signs of a number in an error
REASONING = ("reasoning_content", "reasoning", "thinking")
CALL_IN_TEXT = re.compile(r"<(?:tool_call|function_?call)s?>")  # of models whose calls are text: results need no id

Entry = tuple[str, Any]  # the field in which a message stands, such as "messages[3]", and the message


def role_of(value: Any) -> Role | None:
    """The role of a message, of whatever dialect; None where it has none that is known."""
    if not isinstance(value, dict):
        return None
    return ROLES.get(_role_name(value))


def _role_name(value: dict[str, Any]) -> str:
    name = value.get("from") if value.get("role") is None else value["role"]
    return name.strip().lower() if isinstance(name, str) else ""


def messages_of(entries: Iterable[Entry]) -> tuple[Message, ...]:
    """Our messages of those entries.

    Raises:
        RowError: one of them is none.
        CannotLearn: one of them is more than text, or a tool result answers no call.
    """
    return tuple(_linked([_draft(field, value) for field, value in entries]))


@dataclass(frozen=True)
class _Draft:
    """A message whose calls may have no id yet; `function` is the name that a result of the role `function` gives."""

    field: str
    message: Message
    function: str


def _draft(field: str, value: Any) -> _Draft:
    if not isinstance(value, dict):
        raise RowError(f"{field}: {shown(value)} is not an object with role and content")
    role = role_of(value)
    if role is None:
        key = "role" if value.get("from") is None else "from"
        raise RowError(f"{field}.{key}: {named(value.get(key))} is not one of system, user, assistant, tool")
    calls = _calls(field, value) if role == "assistant" else ()
    name, answers, reason = (value.get(key) for key in ("name", "tool_call_id", "reason"))
    message = Message(
        role,
        "" if _is_function_call(value) else _text(field, value, role, bool(calls)),
        _weight(f"{field}.weight", value.get("weight")),
        printable(reason) if isinstance(reason, str) else "",
        calls,
        printable(answers) if role == "tool" and isinstance(answers, str) else "",
    )
    return _Draft(field, message, name if isinstance(name, str) else "")


def _is_function_call(value: dict[str, Any]) -> bool:
    """ShareGPT's way: a turn of its own whose whole text is the call."""
    return _role_name(value) == "function_call"


def _text(field: str, value: dict[str, Any], role: Role, called: bool) -> str:
    key = next((key for key in ("content", "value") if value.get(key) is not None), "content" if "role" in value else "value")
    text = _content(f"{field}.{key}", value.get(key))
    refusal = value.get("refusal")
    if role == "assistant" and not text and isinstance(refusal, str):
        text = printable(refusal)
    thoughts = next((value[key] for key in REASONING if isinstance(value.get(key), str) and value[key].strip()), None)
    if value.get(key) is None and not (text or called or thoughts or role == "tool"):
        raise RowError(f"{field}.{key}: nothing, and no tool call either")
    if role == "assistant" and thoughts and not text.lstrip().startswith("<think>"):
        return f"<think>\n{printable(thoughts).strip()}\n</think>\n{text}"
    return text


def _content(field: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return printable(value or "")
    if not isinstance(value, list):
        raise RowError(f"{field}: {shown(value)} is not text")
    return "".join(_part(f"{field}[{i}]", part) for i, part in enumerate(value))


def _part(field: str, part: Any) -> str:
    if isinstance(part, str):
        return printable(part)
    if not isinstance(part, dict):
        raise RowError(f"{field}: {shown(part)} is no part of a message")
    kind = part.get("type", "text")
    if not isinstance(kind, str):
        raise RowError(f"{field}.type: {shown(kind)} is not text")
    if kind not in TEXT_PARTS:
        raise CannotLearn("only text can be learned", field, printable(kind[:40]))
    text = part.get(TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise RowError(f"{field}.{TEXT_PARTS[kind]}: {shown(text)} is not text")
    return printable(text)


def _weight(field: str, value: Any) -> float:
    if value is None:
        return 1.0
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (value == 0 or LEAST_WEIGHT <= value <= MOST_WEIGHT):
        given = str(value) if number else named(value)
        raise RowError(f"{field}: {_cut(given)} is not a number that is 0 or from {LEAST_WEIGHT} to {MOST_WEIGHT}")
    return float(value)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def _calls(field: str, value: dict[str, Any]) -> tuple[ToolCall, ...]:
    if _is_function_call(value):
        key = "value" if value.get("content") is None else "content"
        field = f"{field}.{key}"
        calls = _json(field, value.get(key))
        if calls == []:
            raise RowError(f"{field}: no call in it")
        return tuple(_call(field, call) for call in (calls if isinstance(calls, list) else [calls]))
    if value.get("tool_calls") not in (None, "", []):
        calls = listed(value["tool_calls"], f"{field}.tool_calls")
        return tuple(_call(f"{field}.tool_calls[{i}]", call) for i, call in enumerate(calls))
    if value.get("function_call") is not None:
        return (_call(f"{field}.function_call", value["function_call"]),)
    return ()


def _json(field: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parsed(value, strict=True)
    except ValueError as error:
        raise RowError(f"{field}: {error}") from error


def _call(field: str, call: Any) -> ToolCall:
    inside = isinstance(call, dict) and call.get("function") is not None
    function = call["function"] if inside else call
    where = f"{field}.function" if inside else field
    if not isinstance(function, dict):
        raise RowError(f"{where}: {shown(function)} is not an object with name and arguments")
    name, id_ = function.get("name"), call.get("id")
    if not isinstance(name, str) or not name.strip():
        raise RowError(f"{where}.name: {named(name)} is no name of a function")
    return ToolCall(printable(id_) if isinstance(id_, str) else "", printable(name), _arguments(where, function))


def _arguments(field: str, function: dict[str, Any]) -> str:
    """JSON text of an object: as it stands where it is text, written anew where it is an object."""
    key = next((key for key in ("arguments", "parameters") if function.get(key) is not None), "arguments")
    field, value = f"{field}.{key}", function.get(key)
    if value in (None, []) or (isinstance(value, str) and not value.strip()):  # a table's empty map is an empty list
        return "{}"
    if not isinstance(_json(field, value), dict):
        raise RowError(f"{field}: not a JSON object")
    return printable(value) if isinstance(value, str) else json.dumps(tidy(value, field), ensure_ascii=False)


class _Waiting:
    """The calls that no result has answered yet: of all turns, and those of the latest turn in order and by name."""

    def __init__(self) -> None:
        self._every: Counter[str] = Counter()
        self._latest: OrderedDict[str, str] = OrderedDict()  # not a dict: its first key takes ever longer to find as keys go
        self._named: defaultdict[str, OrderedDict[str, None]] = defaultdict(OrderedDict)

    def ask(self, calls: Sequence[ToolCall]) -> None:
        """A turn calls."""
        self._every.update(call.id for call in calls)
        self._latest = OrderedDict((call.id, call.name) for call in calls)
        self._named.clear()
        for call in calls:
            self._named[call.name][call.id] = None

    def answer(self, draft: _Draft, in_a_row: int) -> str:
        """The id of the call that a result answers; `in_a_row`: how many results without an id begin with it.

        Raises:
            CannotLearn: it answers none, or it cannot be told which.
        """
        id_ = draft.message.tool_call_id or self._meant(draft, in_a_row)
        if not self._every[id_]:
            raise CannotLearn("answers no call before it", f"{draft.field}.tool_call_id", named(id_ or None))
        self._every[id_] -= 1
        if id_ in self._latest:
            self._named[self._latest.pop(id_)].pop(id_, None)
        return id_

    def none_of_the_latest(self) -> bool:
        """Whether the latest turn that calls has all its results."""
        return not self._latest

    def _meant(self, draft: _Draft, in_a_row: int) -> str:
        """The call of its name, the only one, or the next one in order."""
        named = self._named.get(draft.function, ())
        if draft.function and len(named) == 1:
            return next(iter(named))
        if len(self._latest) > 1 and in_a_row != len(self._latest):
            waiting = f"nothing, and {len(self._latest)} calls wait"
            raise CannotLearn("it cannot be told which is meant", f"{draft.field}.tool_call_id", waiting)
        return next(iter(self._latest), "")


def _linked(drafts: Sequence[_Draft]) -> Iterator[Message]:
    """Gives every call an id, and every result the id of the call that it answers."""
    taken = {call.id for draft in drafts for call in draft.message.tool_calls}
    fresh = (name for number in count(1) if (name := f"call_{number}") not in taken)
    waiting, in_text = _Waiting(), False  # whether the latest turn calls in its text
    for draft, in_a_row in zip(drafts, _results_without_id(drafts), strict=True):
        message = draft.message
        if message.tool_calls:
            calls = tuple(call if call.id else replace(call, id=next(fresh)) for call in message.tool_calls)
            waiting.ask(calls)
            message = replace(message, tool_calls=calls)
        if message.role == "assistant":
            in_text = bool(CALL_IN_TEXT.search(message.content))
        needs_no_id = in_text and not message.tool_call_id and waiting.none_of_the_latest()
        if message.role == "tool" and not needs_no_id:
            message = replace(message, tool_call_id=waiting.answer(draft, in_a_row))
        yield message


def _results_without_id(drafts: Sequence[_Draft]) -> list[int]:
    """For each message how many results without an id stand in a row from it on."""
    counts, following = [], 0
    for draft in reversed(drafts):
        bare = draft.message.role == "tool" and not draft.message.tool_call_id
        following = following + 1 if bare else 0
        counts.append(following)
    return counts[::-1]
