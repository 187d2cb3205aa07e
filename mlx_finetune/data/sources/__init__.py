"""What every source gives, one by one: conversations, what it did not take and why, and the lines that it could not read."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_finetune.data.conversation import Conversation


@dataclass(frozen=True)
class Rejected:
    """One conversation that was not kept. `id` is the source's own name for it: a log's folder, a tree's id.

    `countable` is the reason without places and values, where it has some; `by_tag`: tags.yaml may take it all the same.
    """

    id: str
    source: str
    reason: str
    countable: str = ""
    by_tag: bool = False

    def to_json(self) -> dict[str, Any]:
        """As it stands in the index."""
        row = {"id": self.id, "source": self.source, "reason": self.reason}
        return row | {name: value for name in ("countable", "by_tag") if (value := getattr(self, name))}


@dataclass(frozen=True)
class BadLine:
    """A line that was passed over; line 0 means the whole file."""

    path: Path
    line: int
    reason: str

    def to_json(self) -> dict[str, Any]:
        """As it stands in collect.json."""
        return {"file": printable(str(self.path)), "line": self.line, "reason": self.reason}


Item = Conversation | Rejected | BadLine


@dataclass(frozen=True)
class Read:
    """All that a source gave, at once; `collect` takes the items one by one instead."""

    conversations: tuple[Conversation, ...]
    rejected: tuple[Rejected, ...]
    bad_lines: tuple[BadLine, ...]


def gather(items: Iterable[Item]) -> Read:
    """The items of a source, sorted by their kind."""
    every = list(items)
    return Read(
        tuple(item for item in every if isinstance(item, Conversation)),
        tuple(item for item in every if isinstance(item, Rejected)),
        tuple(item for item in every if isinstance(item, BadLine)),
    )


def without_pairs(value: Any) -> Any:
    """A list of pairs as the map that it was: pyarrow gives a map as pairs, and nothing else; any other value as it is."""
    pairs = isinstance(value, list) and value and all(isinstance(one, tuple) and len(one) == 2 for one in value)
    return dict(value) if pairs else value


def printable(text: str) -> str:
    """The text with "?" for each lone surrogate, which JSON may hold (\\ud83d cut from its pair) and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="replace").decode("utf-8")
    return text
