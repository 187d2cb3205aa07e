"""Message, Conversation, and the JSON Lines that hold them: one conversation a line."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_file

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)
LEAST_WEIGHT, MOST_WEIGHT = 0.001, 1000  # beyond, float32 sums over a conversation lose the rest


@dataclass(frozen=True)
class Message:
    """One message as the server would receive it. `weight` 0 makes an assistant turn context only."""

    role: Role
    content: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        assert self.role in ROLES, self.role
        assert self.weight >= 0, self.weight


@dataclass(frozen=True)
class Conversation:
    """Messages and where they come from; `group` (a log with its branches, a tree) decides the split."""

    messages: tuple[Message, ...]
    source: str
    group: str
    license: str
    meta: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits of the content: equal conversations have equal ids on every machine."""
        content = [(message.role, message.content) for message in self.messages]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    @property
    def assistant_turns(self) -> int:
        """How many turns there are to learn."""
        return sum(message.role == "assistant" and message.weight > 0 for message in self.messages)

    def to_json(self) -> dict[str, Any]:
        """The line of a collected file; a weight stands there only where it is not 1."""
        messages = [{"role": m.role, "content": m.content} | ({} if m.weight == 1 else {"weight": m.weight}) for m in self.messages]
        return {
            "id": self.id,
            "source": self.source,
            "group": self.group,
            "license": self.license,
            "meta": self.meta,
            "messages": messages,
        }


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
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _conversation(line, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", hint="mlx-finetune collect makes such files") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason}", hint="mlx-finetune collect makes such files") from error


def _conversation(line: str, place: str) -> Conversation:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: half a character (a lone surrogate)", hint="write a ? in place of its \\ud...") from error
    except (ValueError, RecursionError) as error:  # ValueError: more digits than Python reads
        reason = getattr(error, "msg", str(error))
        raise UserError(f"{place}: not JSON: {reason}", hint="mlx-finetune collect makes such files") from error
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise UserError(f'{place}: no list "messages" on this line', hint="mlx-finetune collect makes such files")
    messages = tuple(_message(message, place, index) for index, message in enumerate(row["messages"], 1))
    conversation = Conversation(
        messages=messages,
        source=str(row.get("source") or "chat"),
        group=str(row.get("group") or ""),
        license=str(row.get("license") or "unknown"),
        meta=row["meta"] if isinstance(row.get("meta"), dict) else {},
    )
    if not conversation.group:
        conversation = Conversation(messages, conversation.source, conversation.id, conversation.license, conversation.meta)
    return conversation


def _message(value: Any, place: str, index: int) -> Message:
    where = f"{place}: message {index}"
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
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
    return Message(value["role"], value["content"], float(weight))
