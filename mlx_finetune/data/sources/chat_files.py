"""The rows of a chat file, whatever it is packed in: JSON lines, a JSON list, one JSON object, text; each also as gzip.

What a file is decides its content, not its name. Lines are read one by one and lists element by element, so that the size of a
file does not matter. Only an object with a list of rows in it is held at once where the list is not the first thing in it.
"""

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

from mlx_finetune.data.sources.chat_messages import role_of
from mlx_finetune.data.sources.chat_values import parsed
from mlx_finetune.data.sources.log_files import open_regular
from mlx_finetune.errors import UserError
from mlx_finetune.reading import Line, lines_of

LONGEST_ROW = 64 * 2**20  # bytes of a line, characters of a row in a list
LARGEST_OBJECT = 512 * 2**20  # characters of one JSON object around all rows
CHUNK = 2**20
WRAPPERS = ("data", "train", "examples", "instances")  # keys under which all rows of a file may stand
WRAPPED = re.compile(rf'\{{\s*"(?:{"|".join(WRAPPERS)})"\s*:\s*\[(?=\s*\{{)')
JSON_START = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\{\s*(?:["}]|\Z)|\[\s*(?:[\[{"\]]|\Z))')
LINES_NAME, JSON_NAME = (".jsonl", ".ndjson"), (".jsonl", ".ndjson", ".json")
BETWEEN = re.compile(r"[\s,]*")
DECODER = json.JSONDecoder(parse_constant=lambda name: None)  # as `parsed` has it
BINARY = {
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ\x00": "packed with xz",
    b"SQLite format 3\x00": "an SQLite database",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"\x1f\x8b": "packed twice",
    b"PAR1": "a parquet file packed with gzip",
}
HINT = "pass a .jsonl, .json, .parquet or .txt file (each also as .gz, but for parquet), or a Hugging Face dataset's id"


@dataclass(frozen=True)
class Row:
    """One row. `number`, from 1, names it: its line, or its place in a list; a `fault` stands there in place of a value.

    The value of a text file's rows is text; that of all other rows is what JSON holds.
    """

    line: int
    number: int
    value: Any = None
    fault: str = ""


def rows_of(path: Path) -> Iterator[Row]:
    """Every row of a file that is not parquet.

    Raises:
        UserError: the file cannot be opened, is broken or no text.
    """
    try:
        with open_regular(Path(os.path.realpath(path))) as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream: Any = gzip.GzipFile(fileobj=file) if packed else file
            yield from _rows(stream, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: broken gzip file: {error}", hint="download or copy it again") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}", hint=HINT) from error


def is_parquet(path: Path) -> bool:
    """Whether it begins as parquet does.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        with open_regular(Path(os.path.realpath(path))) as file:
            return file.read(4) == b"PAR1"
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}", hint=HINT) from error


def _rows(file: IO[bytes], path: Path) -> Iterator[Row]:
    head = file.read(CHUNK)
    file.seek(0)
    for magic, what in BINARY.items():
        if head.startswith(magic):
            raise UserError(f"{path}: {what}, not a chat file", hint=f"unpack or convert it first; {HINT}")
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in JSON_NAME and not JSON_START.match(head):
        yield from _documents(file, path)
        return
    way = _way(head, file, path, suffix)
    file.seek(0)
    for row in way(file, path):
        yield from _unwrapped(row)


def _way(head: bytes, file: IO[bytes], path: Path, suffix: str) -> Callable[[IO[bytes], Path], Iterator[Row]]:
    """How JSON is read: line by line, or as one list or object that goes on over several lines, or as one chat."""
    start, newline, _ = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    start = start.rstrip()
    if start[:1] == b"[":
        first = next(_values(file, path), None)
        file.seek(0)
        if first and role_of(first.value):  # a list of messages is one chat
            return _lines if start.endswith(b"]") or not newline else _whole
        if first is None or not first.fault:
            return _values
    elif newline and start[:1] == b"{" and start.endswith((b"[", b"{", b",", b":")):
        return _values
    complete = any(isinstance(row.value, dict | list) for row in islice(_lines(file, path), 2))
    return _lines if complete or (suffix in LINES_NAME and start[:1] != b"[") else _values


def _whole(file: IO[bytes], path: Path) -> Iterator[Row]:
    raw = file.read(LONGEST_ROW + 1)
    yield _row(Line(1, raw if len(raw) <= LONGEST_ROW else None))


def _lines(file: IO[bytes], path: Path) -> Iterator[Row]:
    for line in lines_of(file, LONGEST_ROW):
        if line.raw is None or line.raw.strip():
            yield _row(line)


def _row(line: Line) -> Row:
    row = Row(line.number, line.number)
    if line.raw is None:
        return replace(row, fault=f"longer than {LONGEST_ROW // 2**20} MB")
    raw = line.raw.removeprefix(codecs.BOM_UTF8) if line.number == 1 else line.raw
    try:
        return replace(row, value=parsed(raw.decode().strip()))
    except UnicodeDecodeError as error:
        return replace(row, fault=f"not UTF-8: byte 0x{raw[error.start]:02x} in column {error.start + 1}")
    except ValueError as error:
        return replace(row, fault=str(error))


def _unwrapped(row: Row) -> Iterator[Row]:
    """The rows inside of an object that holds all of them, with their places in its list; else the row itself."""
    value = row.value
    key = next((key for key in WRAPPERS if isinstance(value, dict) and _holds_rows(value.get(key))), None)
    if key is None:
        yield row
    else:
        yield from (Row(row.line, number, one) for number, one in enumerate(value[key], 1))


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


class _Text:
    """The decoded text of a file: `held` is as much of it as is needed, from its `line` on, and `at` the place reached."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._bytes = 0
        self.held, self.at, self.line, self.ended = "", 0, 1, False

    @property
    def ahead(self) -> int:
        """How many characters are held that were not passed yet."""
        return len(self.held) - self.at

    def pass_to(self, end: int) -> None:
        """Moves on, counting lines."""
        self.line += self.held.count("\n", self.at, end)
        self.at = end

    def pass_blanks(self) -> str:
        """Moves on to the next character that is no blank and no comma, and gives it; "" at the end of the file."""
        while True:
            match = BETWEEN.match(self.held, self.at)
            assert match
            self.pass_to(match.end())
            if self.ahead or self.ended:
                return self.held[self.at : self.at + 1]
            self.grow()

    def grow(self) -> None:
        """Reads as much again as is ahead, so that reading a long row takes time in proportion to its length."""
        raw = self._file.read(max(CHUNK, self.ahead))
        self._bytes += len(raw)
        self.ended = not raw
        try:
            self.held, self.at = self.held[self.at :] + self._decoder.decode(raw, final=self.ended), 0
        except UnicodeDecodeError as error:
            raise _not_utf8(self._path, error, self._bytes - len(error.object)) from error


def _not_utf8(path: Path, error: UnicodeDecodeError, before: int = 0) -> UserError:
    byte, place = error.object[error.start], before + error.start + 1
    return UserError(f"{path}: not UTF-8: byte 0x{byte:02x} at place {place:,} of the file", hint="save it as UTF-8 text")


def _values(file: IO[bytes], path: Path) -> Iterator[Row]:
    """The elements of a list, or the objects that stand one after the other, each as soon as it is complete."""
    text = _Text(file, path)
    in_list = text.pass_blanks() == "["
    if in_list:
        text.pass_to(text.at + 1)
    elif wrapped := WRAPPED.match(text.held, text.at):
        in_list = True
        text.pass_to(wrapped.end())
    number = 0
    while (sign := text.pass_blanks()) and not (in_list and sign == "]"):
        number += 1
        row = _value(text, number, LONGEST_ROW if in_list else LARGEST_OBJECT)
        yield row
        if row.fault:
            return
    if in_list and not sign:
        yield Row(text.line, number + 1, fault="cut off: the list is not closed")


def _value(text: _Text, number: int, longest: int) -> Row:
    """The value that comes next, passed over; what is broken makes the rest unreadable too."""
    row, rest = Row(text.line, number), "; nothing behind it was read"
    while True:
        try:
            value, end = DECODER.raw_decode(text.held, text.at)
        except json.JSONDecodeError as error:
            if text.ended:
                line = text.line + text.held.count("\n", text.at, error.pos)
                return replace(row, line=line, fault=f"not JSON, or cut off: {error.msg.removesuffix(' at')}{rest}")
            if text.ahead > longest:
                return replace(row, fault=f"not JSON, or longer than {longest // 2**20} MB{rest}")
        except RecursionError:
            return replace(row, fault=f"not read: nested too deeply{rest}")
        except ValueError as error:  # more digits than Python reads
            return replace(row, fault=f"{error}{rest}")
        else:
            if end < len(text.held) or text.ended:  # a number may go on
                text.pass_to(end)
                return replace(row, value=value)
        text.grow()


def _documents(file: IO[bytes], path: Path) -> Iterator[Row]:
    """The texts of a text file: all of it, or what stands between lines of `<|endoftext|>`."""
    raw = file.read(LONGEST_ROW + 1)
    if len(raw) > LONGEST_ROW:
        hint = 'write one chat a line, as {"messages": [...]}'
        raise UserError(f"{path}: text of more than {LONGEST_ROW // 2**20} MB, which is read whole", hint=hint)
    try:
        text = raw.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error, len(raw) - len(error.object)) from error
    line = 1
    for number, document in enumerate(re.split(r"^<\|endoftext\|>[ \t]*\r?$", text, flags=re.MULTILINE), 1):
        if document.strip():
            yield Row(line, number, document)
        line += document.count("\n")
