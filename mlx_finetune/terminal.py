"""What a person sees: talk and progress on stderr, results on stdout."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_finetune.launched import rank_of


def say(text: str) -> None:
    """A line of talk, of the first process where a launcher started several."""
    if not rank_of():
        print(text, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """What a terminal shows as it stands: blanks for control characters, which could move its cursor, and for line breaks."""
    return text if text.isprintable() else "".join(sign if sign.isprintable() else " " for sign in text)


def one_line(text: str, width: int | None = None) -> str:
    """The words of the text, however it was laid out; only the first `width` characters where that is given."""
    line = " ".join(printable(text[: 4 * width] if width else text).split())
    return line if width is None or len(line) <= width else line[: width - 1] + "…"


@contextmanager
def progress(title: str) -> Iterator[Callable[..., None]]:
    """A bar on stderr; gives a function (done, total, note=""). Where stderr is no terminal: a line at every tenth."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if rank_of() or not console.is_terminal:
        yield _lines(title)
        return
    columns = [
        TextColumn(title),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    ]
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None, note="")
        yield lambda done, total, note="": bar.update(task, completed=done, total=total, note=note)


def _lines(title: str) -> Callable[..., None]:
    said = -1

    def advance(done: int, total: int, note: str = "") -> None:
        nonlocal said
        tenth = 10 * done // max(total, 1)
        if tenth != said:
            said = tenth
            say(f"{title} {100 * done // max(total, 1)} % {note}".rstrip())

    return advance


def table(title: str, rows: Sequence[tuple[str, ...]], header: Sequence[str] = ()) -> None:
    """A small table on stdout; columns after the first are aligned on the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    print(title)
    grid = Table(box=box.SIMPLE, show_header=bool(header), pad_edge=False)
    for i in range(len(rows[0])):
        grid.add_column(header[i] if header else "", justify="left" if i == 0 else "right")
    for row in rows:
        grid.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False).print(grid)  # text of files stands in cells


def finish(result: Mapping[str, Any], as_json: bool, show: Callable[[], None], made: Path | None, following: str) -> None:
    """The end of a verb: with --json the result as one object and nothing else on stdout; else what `show` prints and the path."""
    if rank_of():
        return
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        show()
        if made:
            print(made)
    if following:
        say(f"next: {following}")
