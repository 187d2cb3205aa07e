"""Lines of JSON that a run writes as it goes, each with its step; a run that goes on first drops what lies after its checkpoint."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_file
from mlx_finetune.reading import Line, lines_of, open_ordinary
from mlx_finetune.training.memory_watch import again

HINT = "take the line out, or start a new run"
NUMBER = (int, float)
Row = dict[str, Any]
Needed = Mapping[str, type | tuple[type, ...]]  # what each line has, and of which type it is


class Journal:
    """Appends to the file. `kept`: what an earlier start wrote up to the step at which this one goes on."""

    def __init__(self, path: Path, start: int, needed: Needed, what: str) -> None:
        """`start`: steps already done. `needed`, `what`: see `read_rows`."""
        self.path = path
        self.kept = [row for row in read_rows(path, needed, what) if row["step"] <= start] if start and path.is_file() else []
        with atomic_file(path) as file:
            file.write(_lines(self.kept))

    def append(self, *rows: Row) -> None:
        """All of them or, where the machine stops, a last line that readers leave out.

        Raises:
            UserError: there is no room for them, or the place cannot be written to.
        """
        try:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(_lines(rows))
        except OSError as error:
            hint = f"the last checkpoint is whole: make room, then {again(str(self.path.parent))}"
            raise UserError(f"{self.path}: cannot be written: {error.strerror}", hint=hint) from error


def read_rows(path: Path, needed: Needed, what: str) -> list[Row]:
    """All rows; a last line that a crash cut is left out.

    Raises:
        UserError: the file cannot be read; a line is not JSON or has not what is `needed`; it is called a line of `what`.
    """
    rows: list[Row] = []
    broken: UserError | None = None  # a crash may cut the last line, within a character too
    try:
        with open_ordinary(path) as file:
            for line in lines_of(file):
                if broken and line.raw != b"\n":
                    raise broken
                try:
                    row = json.loads(_whole(line))
                except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
                    broken = broken or UserError(f"{path}:{line.number}: not JSON: {error}", hint=HINT)
                    continue
                if not isinstance(row, dict) or not all(n in row and isinstance(row[n], kind) for n, kind in needed.items()):
                    raise UserError(f"{path}:{line.number}: not a line of {what}", hint=HINT)
                rows.append(row)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", hint=HINT) from error
    return rows


def _whole(line: Line) -> bytes:
    if line.raw is None:
        raise ValueError("longer than any such line")
    return line.raw


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
