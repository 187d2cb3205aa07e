"""The rows of OpenAssistant files, wherever they lie: JSON Lines (also gzip), parquet, a folder of either, the Hub.

What a file is, its first bytes say; its name only counts in a folder, where other files may lie beside it.
"""

import gzip
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_finetune.data.sources import BadLine, printable, without_pairs
from mlx_finetune.errors import UserError
from mlx_finetune.reading import LONGEST_LINE, Line, lines_of

HINT = "pass OpenAssistant/oasst1, OpenAssistant/oasst2, or a file or folder of theirs (.jsonl, .jsonl.gz or .parquet)"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz")
# of the 18 columns on the Hub and of the other layouts those that are used: the rest is never decoded
COLUMNS = {
    *("message_id", "parent_id", "created_date", "text", "role", "lang", "review_result", "deleted", "rank", "synthetic"),
    *("message_tree_id", "tree_state", "labels", "prompt", "replies", "thread_id", "thread"),
}


@dataclass(frozen=True)
class Row:
    """One object of a file; `line` counts from 1, and in parquet it is the row."""

    path: Path
    line: int
    value: dict[str, Any]


def read_rows(source: str | Path) -> Iterator[Row | BadLine]:
    """Every row of a file, of a folder's parquet files (else its JSON Lines), or of a dataset on the Hub.

    Only a hub id, `owner/name` where nothing of that name lies here, may use the network. Nothing is written beside the
    files.

    Raises:
        UserError: there is no such thing, or the Hub does not give it.
    """
    path = Path(source)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, FileNotFoundError) and HUB_ID.fullmatch(str(source)) and not str(source).endswith(ENDINGS):
            yield from hub_rows(str(source))
            return
        raise UserError(f"{shown(source)}: {getattr(error, 'strerror', error)}", hint=HINT) from error
    yield from _folder_rows(path) if stat.S_ISDIR(mode) else _file_rows(path)


def shown(source: str | Path) -> str:
    """A name that fits on one line of UTF-8, whatever it is made of."""
    return " ".join(printable(str(source)).split())


def hub_rows(name: str) -> Iterator[Row | BadLine]:
    """The rows of all splits of a dataset, from the Hub or from what `datasets` has kept of it.

    Raises:
        UserError: no network, no such dataset, or one that needs a login.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    # the bases of HfHubHTTPError are OSError and the error of whichever HTTP library huggingface_hub uses
    failures = (*HfHubHTTPError.__bases__, datasets.exceptions.DatasetsError, ValueError, RuntimeError)
    try:
        splits = datasets.load_dataset(name)
    except failures as error:
        reason = " ".join(printable(str(error)).split())[:160]
        hint = "check the id and the network, `hf auth login` for a gated dataset; or download it and pass its folder"
        raise UserError(f"{name}: the Hub does not give it: {reason}", hint=hint) from error
    line = 0
    for split in splits.values():
        wanted = split.select_columns([column for column in split.column_names if column in COLUMNS])
        for table in wanted.with_format("arrow").iter(batch_size=1000):
            for value in table.to_pylist():
                line += 1
                yield Row(Path(name), line, value)


def _folder_rows(folder: Path) -> Iterator[Row | BadLine]:
    """Parquet is taken alone where there is some: beside it a clone of oasst1 has the same messages as JSON Lines."""
    unreadable: list[OSError] = []
    # a snapshot in the cache of huggingface_hub links to ../../blobs
    inside = (folder.resolve().parents[1] if folder.resolve().parent.name == "snapshots" else folder.resolve()).as_posix() + "/"
    files: list[Path] = []
    for here, folders, names in os.walk(folder, onerror=unreadable.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(here, name) for name in names if name.endswith(ENDINGS) and not name.startswith(".")]
    for error in unreadable:
        yield BadLine(Path(error.filename), 0, error.strerror or "cannot be read")
    parquet = [path for path in files if path.suffix == ".parquet"]
    for path in sorted(parquet or files, key=lambda path: ("train" not in path.as_posix()[len(str(folder)) :], path)):
        if _lies_inside(path, inside):
            yield from _file_rows(path)
        else:
            yield BadLine(path, 0, "a link out of the folder, not followed")


def _lies_inside(path: Path, inside: str) -> bool:
    try:
        return path.resolve().as_posix().startswith(inside)
    except (OSError, RuntimeError):  # a loop of links
        return False


def _file_rows(path: Path) -> Iterator[Row | BadLine]:
    """A file that cannot be read, or not to its end, is one BadLine."""
    line = 0
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe could wait for ever
            raise OSError(0, "not an ordinary file")
        with path.open("rb") as file:
            magic = file.peek(4)[:4]
            text = gzip.GzipFile(fileobj=file) if magic.startswith(b"\x1f\x8b") else file
            for row in _parquet_rows(path) if magic == b"PAR1" else _json_rows(path, text):
                line = row.line
                yield row
    except (EOFError, zlib.error, gzip.BadGzipFile):
        yield BadLine(path, line + 1, "broken gzip: the file ends here; download it again")
    except OSError as error:
        yield BadLine(path, line, error.strerror or "cannot be read")


def _json_rows(path: Path, file: Any) -> Iterator[Row | BadLine]:
    for line in lines_of(file):
        try:
            value = _json_object(line)
        except ValueError as error:
            yield BadLine(path, line.number, str(error))
        else:
            if value is not None:
                yield Row(path, line.number, value)


def _json_object(line: Line) -> dict[str, Any] | None:
    """The object on the line; None for a blank line. Raises ValueError with the reason where there is none."""
    if line.raw is None:
        raise ValueError(f"longer than {LONGEST_LINE // 2**20} MB")
    try:
        text = line.raw.decode("utf-8-sig" if line.number == 1 else "utf-8").strip()
        value = json.loads(text) if text else None
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise ValueError("not JSON, or cut off") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:  # more digits than Python reads
        raise ValueError("not JSON: a number of thousands of digits") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _parquet_rows(path: Path) -> Iterator[Row | BadLine]:
    """By pyarrow itself, which `datasets` reads parquet with: no copy in a cache, and only the columns that are used."""
    import pyarrow
    import pyarrow.parquet

    line = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in COLUMNS]
            for batch in file.iter_batches(batch_size=1000, columns=columns):
                for value in batch.to_pylist():
                    line += 1
                    yield Row(path, line, _with_objects(value))
    except (pyarrow.ArrowException, ValueError, OverflowError):  # not UTF-8; a date that Python has not
        yield BadLine(path, line + 1, "broken parquet: the file ends here; download it again")


def _with_objects(value: Any) -> Any:
    """Maps, at any depth, are objects."""
    value = without_pairs(value)
    if isinstance(value, dict):
        return {key: _with_objects(one) for key, one in value.items()}
    return [_with_objects(one) for one in value] if isinstance(value, list) else value
