"""Ctrl-C, or a polite kill, ends a run between two steps, after saving; a second Ctrl-C ends it at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interrupt:
    """`asked` becomes true at the first Ctrl-C, and at SIGTERM: of a cluster that takes the machine back, or of a launcher."""

    asked: bool = False
    ending: bool = False  # set where a run ends by itself: a launcher that ends it too is to let it say so


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """While inside, SIGTERM and the first SIGINT only set `asked`; the next SIGINT raises KeyboardInterrupt."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        interrupt.asked = True
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])

    for number in before:
        signal.signal(number, ask)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if interrupt.ending and number == signal.SIGTERM else handler)
