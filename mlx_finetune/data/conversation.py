"""Message, Conversation, and the JSON Lines that hold them: one conversation a line."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_file
from mlx_finetune.reading import Line, lines_of, open_ordinary

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)
SECRET = re.compile(r"\[REDACTED:[a-z0-9_]+:#?[0-9]+\]")  # in place of a secret
LONGEST_CHAT = 256 * 2**20  # bytes of a line: beyond, it is no conversation
LEAST_WEIGHT, MOST_WEIGHT = 0.001, 1000  # beyond, float32 sums over a conversation lose the rest


@dataclass(frozen=True)
class ToolCall:
    """A call that the model makes natively. `arguments` is a JSON object as text, as OpenAI's format has it."""

    id: str
    name: str
    arguments: str

    def to_json(self) -> dict[str, Any]:
        """As it stands in a message of OpenAI's format."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Message:
    """One message as the server would receive it. `weight` 0 makes an assistant turn context only; `reason` says why."""

    role: Role
    content: str
    weight: float = 1.0
    reason: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""  # of a message of role tool: the call that it answers

    def __post_init__(self) -> None:
        assert self.role in ROLES, self.role
        assert self.weight >= 0, self.weight

    def to_json(self) -> dict[str, Any]:
        """Only what says something: a weight that is not 1, a reason, calls."""
        plain = {"role": self.role, "content": self.content}
        if self.weight == 1 and not (self.reason or self.tool_calls or self.tool_call_id):
            return plain
        more = {
            "weight": None if self.weight == 1 else self.weight,
            "reason": self.reason,
            "tool_calls": [call.to_json() for call in self.tool_calls],
            "tool_call_id": self.tool_call_id,
        }
        return plain | {k: v for k, v in more.items() if v not in (None, "", [])}


@dataclass(frozen=True)
class Conversation:
    """Messages and where they come from; `group` (a log with its branches and near-duplicates, a tree) decides the split.

    `meta` holds what a person chooses by: name (the source's own name for it), title, tool_format, model, time (of the
    last message, ISO 8601 in UTC), begun (the same of the first). `tools` are the schemas that the model was given, as OpenAI's
    format has them.
    """

    messages: tuple[Message, ...]
    source: str
    group: str
    license: str
    meta: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits of the content: equal conversations have equal ids on every machine.

        Which secret stood at a placeholder makes no difference: the numbers of secrets change as a collection grows.
        """
        parts: list[bytes] = []
        for message in self.messages:
            calls = json.dumps([call.to_json() for call in message.tool_calls]) if message.tool_calls else ""
            for part in (message.role, message.content, calls):
                part = SECRET.sub("[REDACTED]", part) if "[REDACTED:" in part else part
                raw = part.encode("utf-8", errors="surrogatepass")
                parts += [b"%d:" % len(raw), raw]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    @property
    def name(self) -> str:
        """The source's own name for it: a log's folder, a tree's id, a file and line."""
        return str(self.meta.get("name") or self.group)

    @property
    def assistant_turns(self) -> int:
        """How many turns there are to learn."""
        return sum(message.role == "assistant" and message.weight > 0 for message in self.messages)

    def head(self) -> dict[str, Any]:
        """What the line of a collected file says of the conversation as a whole, before its messages."""
        return {"id": self.id, "source": self.source, "group": self.group, "license": self.license, "meta": self.meta}

    def to_json(self) -> dict[str, Any]:
        """The line of a collected file; a weight stands there only where it is not 1."""
        messages = {"messages": [message.to_json() for message in self.messages]}
        return self.head() | messages | ({"tools": list(self.tools)} if self.tools else {})


def write_conversations(path: Path, conversations: Iterable[Conversation]) -> int:
    """Writes one conversation a line and says how many; the file appears whole or not at all."""
    count = 0
    with atomic_file(path) as file:
        for conversation in conversations:
            file.write(json.dumps(conversation.to_json(), ensure_ascii=False) + "\n")
            count += 1
    return count


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Reads what `write_conversations` wrote, or any file with `messages` (role, content) on each line.

    Raises:
        UserError: with file, line, value and remedy, for the first line that is not a conversation.
    """
    try:
        with open_ordinary(path) as file:
            for line in lines_of(file, LONGEST_CHAT):
                text = text_of_line(line, f"{path}:{line.number}")
                if text.strip():
                    yield conversation_of_line(text, f"{path}:{line.number}")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", hint="mlx-finetune collect makes such files") from error


def text_of_line(line: Line, place: str) -> str:
    """The line as text; raises UserError where it is too long to be a conversation, or not UTF-8."""
    if line.raw is None:
        raise UserError(f"{place}: longer than {LONGEST_CHAT >> 20} MB", hint="mlx-finetune collect makes such files")
    try:
        return line.raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text: {error.reason}", hint="mlx-finetune collect makes such files") from error


def conversation_of_line(line: str, place: str) -> Conversation:
    """The conversation on one line of a file; raises UserError where it is none. `place` says where it stands."""
    try:
        row = json.loads(line)
        if "\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: half a character (a lone surrogate)", hint="write a ? in place of its \\ud...") from error
    except (ValueError, RecursionError) as error:  # ValueError: more digits than Python reads
        reason = getattr(error, "msg", str(error))
        raise UserError(f"{place}: not JSON: {reason}", hint="mlx-finetune collect makes such files") from error
    return conversation_of(row, place)


def conversation_of(row: Any, place: str) -> Conversation:
    """The conversation of one line, read as JSON.

    Raises:
        UserError: it is none; `place` says where it stands.
    """
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise UserError(f'{place}: no list "messages" on this line', hint="mlx-finetune collect makes such files")
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{place}: tools is not a list of objects", hint="OpenAI's format has a list of function schemas")
    conversation = Conversation(
        messages=tuple(_message(message, place, index) for index, message in enumerate(row["messages"], 1)),
        source=str(row.get("source") or "chat"),
        group=str(row.get("group") or ""),
        license=str(row.get("license") or "unknown"),
        meta=row["meta"] if isinstance(row.get("meta"), dict) else {},
        tools=tuple(tools),
    )
    return conversation if conversation.group else replace(conversation, group=conversation.id)


def _message(value: Any, place: str, index: int) -> Message:
    where = f"{place}: message {index}"
    calls = _tool_calls(value.get("tool_calls"), where) if isinstance(value, dict) else ()
    content = value.get("content") if isinstance(value, dict) else None
    content = "" if content is None and calls else content
    if not isinstance(value, dict) or not isinstance(content, str):
        raise UserError(f"{where}: no text in content", hint='a message is {"role": ..., "content": "..."}')
    if value.get("role") not in ROLES:
        raise UserError(
            f"{where}: role {value.get('role')!r:.40} is not one of {', '.join(ROLES)}", hint="rename the role in the file"
        )
    weight = value.get("weight", 1.0)
    if not isinstance(weight, int | float) or not (weight == 0 or LEAST_WEIGHT <= weight <= MOST_WEIGHT):
        raise UserError(
            f"{where}: weight {weight!r:.40} is not a number that is 0 or from {LEAST_WEIGHT} to {MOST_WEIGHT}",
            hint="0 reads the turn without learning it",
        )
    reason, answers = (str(value.get(key) or "") for key in ("reason", "tool_call_id"))
    return Message(value["role"], content, float(weight), reason, calls, answers)


def _tool_calls(value: Any, where: str) -> tuple[ToolCall, ...]:
    """Raises UserError where one of them is no function call with its arguments as JSON text."""
    calls = []
    for call in value or () if isinstance(value, list | None) else (value,):
        function = call.get("function") if isinstance(call, dict) else None
        name, arguments = (function.get(key) if isinstance(function, dict) else None for key in ("name", "arguments"))
        if not isinstance(name, str) or not isinstance(arguments, str):
            raise UserError(
                f"{where}: a tool call without a name or with arguments that are not text",
                hint='a call is {"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}',
            )
        calls.append(ToolCall(str(call.get("id") or ""), name, arguments))
    return tuple(calls)
