"""What `prepare` knows of each collected conversation before it encodes it: a few hundred bytes, and where it stands."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from sys import intern

from mlx_finetune.data.conversation import Conversation, conversation_of, read_conversations
from mlx_finetune.errors import UserError

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Entry:
    """One conversation of a collected file. `time` is that of its last message, in seconds since 1970; -inf where unknown."""

    source: str
    group: str
    name: str
    time: float = -math.inf
    path: Path = Path()
    number: int = 0  # of the line, from 1
    start: int = 0  # of the line, in bytes
    length: int = 0


def entries_of(paths: Sequence[Path]) -> list[Entry]:
    """Reads every file once, holding one line at a time.

    Raises:
        UserError: for the first line that is not a conversation.
    """
    return [entry for path in paths for entry in _entries(path)]


def read_entry(entry: Entry) -> Conversation:
    """The conversation itself.

    Raises:
        UserError: it is not there any more.
    """
    place = f"{entry.path}:{entry.number}"
    try:
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            return conversation_of(json.loads(file.read(entry.length)), place)
    except (OSError, ValueError) as error:
        raise UserError(f"{place}: changed while it was read", hint="run prepare again") from error


def seconds(time: object) -> float:
    """Of an ISO 8601 text, in UTC where it names no zone; -inf for anything else."""
    if not isinstance(time, str):
        return -math.inf
    try:
        moment = datetime.fromisoformat(time)
    except ValueError:
        return -math.inf
    return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - EPOCH).total_seconds()


def _entries(path: Path) -> Iterator[Entry]:
    for conversation, (number, start, length) in zip(read_conversations(path), _lines(path), strict=True):
        source, group, name = conversation.source, conversation.group, conversation.name
        time = seconds(conversation.meta.get("time"))
        yield Entry(intern(source), group, group if name == group else name, time, path, number, start, length)


def _lines(path: Path) -> Iterator[tuple[int, int, int]]:
    """Number, first byte and bytes of each line that is not blank; a line ends where Python ends it in a text file."""
    number = start = 0
    with path.open("rb") as file:
        for raw in file:
            for line in raw.splitlines(keepends=True):
                number += 1
                if line.startswith(b"{") or line.decode(errors="replace").strip():
                    yield number, start, len(line)
                start += len(line)
