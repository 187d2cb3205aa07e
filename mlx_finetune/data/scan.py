"""Where secrets stand in what `collect` would read: kind, file and line, never the value."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_finetune.data.conversation import Conversation
from mlx_finetune.data.redact import Rules, find, redact_conversation
from mlx_finetune.data.refining import FileSource
from mlx_finetune.data.sources import gptme as gptme_source
from mlx_finetune.data.sources.log_files import json_object, lines_of, open_regular

LARGEST_FILE = 2**20  # bytes of an attached file or a config that are looked at


@dataclass(frozen=True)
class Hit:
    """So many secrets of one kind on a line; line 0: somewhere in the file."""

    kind: str
    file: str
    line: int
    count: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def scan_log(log: gptme_source.Log, rules: Rules) -> Iterator[Hit]:
    """The log, its branches, its config and the copies of attached files; unreadable ones are passed over."""
    folder = log.folder
    for path in [log.path, *(gptme_source.branches_of(folder) if folder else ())]:
        yield from _scan_lines(path, rules)
    attached = folder / "files" if folder else None
    inside = sorted(attached.iterdir()) if attached and attached.is_dir() and not attached.is_symlink() else []
    for path in [*([folder / "config.toml"] if folder else []), *inside]:
        yield from _scan_text(path, rules)


def _scan_lines(path: Path, rules: Rules) -> Iterator[Hit]:
    try:
        with open_regular(path) as file:
            for line in lines_of(file):
                try:
                    row = json_object(line)
                except ValueError:
                    continue
                yield from _hits(_strings(row), rules, str(path), line.number)
    except OSError:
        return


def _scan_text(path: Path, rules: Rules) -> Iterator[Hit]:
    try:
        with open_regular(path) as file:
            text = file.read(LARGEST_FILE).decode("utf-8", errors="replace")
    except OSError:
        return
    starts = Counter((found.kind, text.count("\n", 0, found.start) + 1) for found in find(text, rules))
    for (kind, line), count in starts.items():
        yield Hit(kind, str(path), line, count)


def scan_file(source: FileSource, rules: Rules) -> Iterator[Hit]:
    """An OpenAssistant or chat file; a row is named as its reader names it."""
    for item in source.items():
        if isinstance(item, Conversation):
            kinds: Counter[str] = Counter()
            redact_conversation(item, rules, lambda kind, value, kinds=kinds: kinds.update([kind]) or "")  # type: ignore[misc]
            file, _, line = item.name.rpartition(":")
            for kind, count in kinds.items():
                yield Hit(kind, file if line.isdigit() else item.name, int(line) if line.isdigit() else 0, count)


def _hits(texts: Iterable[str], rules: Rules, file: str, line: int) -> Iterator[Hit]:
    kinds = Counter(found.kind for text in texts for found in find(text, rules))
    for kind, count in kinds.items():
        yield Hit(kind, file, line, count)


def _strings(value: Any) -> Iterator[str]:
    """Every string inside, without recursion: what was read may be nested deeply."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
