"""What a person sees: talk and progress on stderr, results on stdout."""

import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_finetune.launched import rank_of


def is_utf8(encoding: str | None) -> bool:
    """Whether a stream takes every sign."""
    return (encoding or "").lower().replace("-", "").replace("_", "") == "utf8"


def show_every_sign() -> None:
    """Where a terminal is told to be ASCII or the like: what it does not have is shown as \\u2026, and breaks nothing off."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not is_utf8(stream.encoding):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Lines of talk, of the first process where a launcher started several; names of files that steer a terminal do not.

    Behind what was printed before, also where both go into one file.
    """
    if not rank_of():
        with suppress(OSError, ValueError):  # nobody reads it any more: what prints says so
            sys.stdout.flush()
        print("\n".join(map(printable, text.split("\n"))), file=sys.stderr, flush=True)


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
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", markup=False),
    ]
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None, note="")
        yield lambda done, total, note="": bar.update(task, completed=done, total=total, note=note)


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """For what takes seconds and cannot be counted: on a terminal the time that it has taken so far, elsewhere the title alone."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if rank_of() or not console.is_terminal:
        say(title)
        yield
        return
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console) as spinner:
        spinner.add_task(title, total=None)
        yield


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


@dataclass(frozen=True)
class Done:
    """What a verb did: its result, what shows it on stdout, the path that was made, and the next command."""

    result: Mapping[str, Any]
    show: Callable[[], None]
    made: Path | None
    following: str

    def finish(self, as_json: bool) -> None:
        """The end of a verb; see `finish`."""
        finish(self.result, as_json, self.show, self.made, self.following)


def finish(result: Mapping[str, Any], as_json: bool, show: Callable[[], None], made: Path | None, following: str) -> None:
    """The end of a verb: with --json the result as one object and nothing else on stdout; else what `show` prints and the path."""
    if rank_of():
        return
    if as_json:
        print(json.dumps(result, ensure_ascii=not is_utf8(sys.stdout.encoding)))
    else:
        show()
        if made:
            print(made)
    if following:
        say(f"next: {following}")


STATES = {"ok": "green", "optional": "dim", "note": "yellow", "fails": "bold red"}


def checklist(rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Rows of state, what, what was found and what to do, on stdout; long texts go on below themselves."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for state, what, found, advice in rows:
        grid.add_row(Text(state, STATES[state]), printable(what), printable(found))
        if advice:
            grid.add_row("", "", Text(f"-> {printable(advice)}", "bold" if state in ("note", "fails") else "dim"))
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(grid)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))
