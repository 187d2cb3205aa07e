"""The conversations of collected files as light entries: what decides their split, and where their text lies.

So that a collection may be larger than the memory: the text of one conversation at a time is held.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mlx_finetune.data.conversation import LONGEST_CHAT, Conversation, conversation_of_line, text_of_line
from mlx_finetune.errors import UserError
from mlx_finetune.reading import Line, lines_of, open_ordinary

HINT = "mlx-finetune collect makes such files"


@dataclass(frozen=True, slots=True)
class Entry:
    """One conversation. `time` is that of its last message, in seconds since 1970; minus infinity where it is not known.

    `learned`: of its assistant turns, counted from 0, the n-th is to be learned where bit n is set.
    """

    source: str
    group: str
    name: str
    time: float
    path: Path
    line: int  # from 1
    start: int  # bytes
    length: int
    id: str
    learned: int

    @property
    def place(self) -> str:
        """File and line, for a person."""
        return f"{self.path}:{self.line}"


def entries(path: Path) -> Iterator[Entry]:
    """Reads the file once and checks every line.

    Raises:
        UserError: with file, line, value and remedy, for the first line that is not a conversation.
    """
    start = 0
    known: dict[str, str] = {}  # a source stands once in memory
    try:
        with open_ordinary(path) as file:
            for line in lines_of(file, LONGEST_CHAT):
                place, raw = f"{path}:{line.number}", line.raw or b""
                if text := text_of_line(line, place).strip():
                    one = conversation_of_line(text, place)
                    source, time = known.setdefault(one.source, one.source), seconds(one.meta.get("time"))
                    yield Entry(source, one.group, one.name, time, path, line.number, start, len(raw), one.id, _learned(one))
                start += len(raw)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", hint=HINT) from error


def read_entry(entry: Entry) -> Conversation:
    """The conversation itself.

    Raises:
        UserError: the file was changed since the entry was made.
    """
    try:
        with open_ordinary(entry.path) as file:
            file.seek(entry.start)
            text = text_of_line(Line(entry.line, file.read(entry.length)), entry.place)
    except OSError as error:
        raise UserError(f"{entry.path}: {error.strerror}", hint=HINT) from error
    conversation = conversation_of_line(text, entry.place)
    if (conversation.source, conversation.name, conversation.id) != (entry.source, entry.name, entry.id):
        raise UserError(f"{entry.place}: another conversation than a moment ago", hint="prepare again when nothing writes there")
    return conversation


def seconds(time: object) -> float:
    """A time as ISO 8601 has it, in seconds since 1970; minus infinity for what is none. Without an offset it is UTC."""
    try:
        moment = datetime.fromisoformat(time) if isinstance(time, str) else None
    except ValueError:
        moment = None
    if moment is None:
        return -math.inf
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _learned(conversation: Conversation) -> int:
    turns = (message for message in conversation.messages if message.role == "assistant")
    return sum(1 << n for n, message in enumerate(turns) if message.weight > 0)
