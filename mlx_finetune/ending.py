"""How a verb ends before its end: a Ctrl-C is heard wherever it falls, and SIGTERM removes what is half-written."""

import _thread
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from mlx_finetune.launched import launched

MAKES_NOTHING = ("serve", "chat", "doctor", "plan")  # of which nothing could be half-written


class Verbs(TyperGroup):
    """Says at a Ctrl-C that it was heard, which typer does not."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Reads the arguments."""
        with _said(lambda: ""):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Runs the verb."""
        with _said(lambda: "" if ctx.invoked_subcommand in MAKES_NOTHING else ": nothing half-written is left"):
            return super().invoke(ctx)


@contextmanager
def _said(what: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        print(f"interrupted{what()}", file=sys.stderr)
        raise typer.Exit(130) from error


@contextmanager
def heard_everywhere() -> Iterator[None]:
    """While inside, a Ctrl-C that falls into what Python does by the way, such as removing an object, comes once more.

    There it would be printed with a traceback, and the verb would go on.
    """
    before = sys.unraisablehook

    def again(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(0.01, _thread.interrupt_main).start()  # here it would be lost again
        else:
            before(unraisable)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """While inside, SIGTERM raises SystemExit, as Python does for Ctrl-C, so that what is half-written is removed.

    A launcher's processes go on as they are: one that waits for another in the engine's own code would not hear it.
    """
    mine = threading.current_thread() is threading.main_thread() and not launched()
    if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one would break off the removing
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) in (end, signal.SIG_IGN):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
