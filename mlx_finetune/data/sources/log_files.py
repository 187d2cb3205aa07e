"""Files of a folder that anybody may have written to: nothing is followed, nothing blocks, nothing is held that is too large."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mlx_finetune.reading import LONGEST_LINE, Line

DECODER = json.JSONDecoder()


def open_regular(path: Path) -> IO[bytes]:
    """The file for reading, if it is an ordinary one.

    Raises:
        OSError: it is missing or unreadable, a link (never followed), or a pipe or device (which could block).
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise OSError(error.errno, "a link, not followed", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(0, "not an ordinary file", str(path))
    return os.fdopen(handle, "rb")


def lines_at_once(file: IO[bytes]) -> Iterator[Line]:
    """Every line of a file that is small enough to be held whole."""
    return (Line(number, raw) for number, raw in enumerate(file.read().split(b"\n"), 1) if raw)


def json_object(line: Line) -> dict[str, Any] | None:
    """The object on the line; None for a blank line.

    Raises:
        ValueError: with the reason why the line holds none.
    """
    if line.raw is None:
        raise ValueError(f"longer than {LONGEST_LINE // 2**20} MB")
    text = line.raw.decode("utf-8", errors="replace")
    text = text.removeprefix("\ufeff") if line.number == 1 else text  # a byte order mark
    if not text or text.isspace():
        return None
    try:
        row = DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON, or cut off: {error.msg.removesuffix(' at')}, column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("not a message: nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError("not a message: a JSON object is expected")
    return row
