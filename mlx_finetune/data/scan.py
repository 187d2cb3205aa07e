"""Where secrets stand in what `collect` would read: kind, file and line, never the value."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_finetune.data.redact import Rules, find, find_all
from mlx_finetune.data.redaction.strings import texts_in
from mlx_finetune.data.refining import FileSource
from mlx_finetune.data.sources import BadLine, chat_formats, printable
from mlx_finetune.data.sources import gptme as gptme_source
from mlx_finetune.data.sources.chat_files import Row
from mlx_finetune.data.sources.gptme_branches import branches_of
from mlx_finetune.data.sources.log_files import json_object, open_regular
from mlx_finetune.data.sources.oasst_files import read_rows
from mlx_finetune.reading import lines_of

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


def scan_log(log: gptme_source.Log, rules: Rules) -> Iterator[Hit | BadLine]:
    """The log, its branches, its config and the copies of attached files; what cannot be read is a BadLine."""
    folder = log.folder
    branches, unread = branches_of(folder) if folder else ([], [])
    yield from (one for one in unread if isinstance(one, BadLine))
    for path in [log.path, *branches]:
        yield from _scan_lines(path, rules)
    attached = folder / "files" if folder else None
    inside = sorted(attached.iterdir()) if attached and attached.is_dir() and not attached.is_symlink() else []
    for path in [*([folder / "config.toml"] if folder else []), *inside]:
        yield from _scan_text(path, rules)


def _scan_lines(path: Path, rules: Rules) -> Iterator[Hit | BadLine]:
    try:
        with open_regular(path) as file:
            for line in lines_of(file):
                try:
                    row = json_object(line)
                except ValueError as error:
                    text = (line.raw or b"").decode("utf-8", errors="replace")
                    yield from _hits(text, rules, str(path), line.number) if text else [BadLine(path, line.number, str(error))]
                else:
                    yield from _hits(row, rules, str(path), line.number)
    except OSError as error:
        yield BadLine(path, 0, error.strerror or "cannot be read")


def _scan_text(path: Path, rules: Rules) -> Iterator[Hit | BadLine]:
    try:
        with open_regular(path) as file:
            text = file.read(LARGEST_FILE).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return  # a log need not have a config
    except OSError as error:
        yield BadLine(path, 0, error.strerror or "cannot be read")
        return
    starts = Counter((found.kind, text.count("\n", 0, found.start) + 1) for found in find(text, rules))
    for (kind, line), count in starts.items():
        yield Hit(kind, str(path), line, count)


def scan_file(source: FileSource, rules: Rules) -> Iterator[Hit | BadLine]:
    """Every row of an OpenAssistant or chat file, also of those that `collect` would reject.

    Raises:
        UserError: as the reader of such files.
    """
    if source.source == "chat":

        def of(rows: Iterator[Row], path: Path, _: str) -> Iterator[Hit | BadLine]:
            for row in rows:
                yield from [BadLine(path, row.line, row.fault)] if row.fault else _hits(row.value, rules, str(path), row.line)

        yield from chat_formats.walk(source.name, of)
    else:
        for one in read_rows(source.name):
            yield from [one] if isinstance(one, BadLine) else _hits(one.value, rules, str(one.path), one.line)


def _hits(value: Any, rules: Rules, file: str, line: int) -> Iterator[Hit]:
    """In every text of a row."""
    kinds = Counter(found.kind for of in find_all(list(texts_in(value)), rules) for found in of)
    for kind, count in kinds.items():
        yield Hit(kind, printable(file), line, count)
