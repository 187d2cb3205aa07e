"""Ctrl-C, or a polite kill, ends a run between two steps, after saving; a second Ctrl-C ends it at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from mlx_finetune.launched import launched

GRACE = 2.0  # seconds in which a second Ctrl-C may end what is being done in order; an engine in its own code does not hear it
LAST_WORDS = b"\ninterrupted at once\n"


@dataclass
class Interrupt:
    """`asked` becomes true at the first Ctrl-C, and at SIGTERM: of a cluster that takes the machine back, or of a launcher."""

    asked: bool = False
    ending: bool = False  # set where a run ends by itself: a launcher that ends it too is to let it say so


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """While inside, SIGTERM and the first SIGINT only set `asked`; the next SIGINT raises KeyboardInterrupt.

    Where that is not heard within `GRACE`, as in the midst of a long step, the process ends with status 130.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        interrupt.asked = True
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])

    with _ended_by_the_second():
        for number in before:
            signal.signal(number, ask)
        try:
            yield interrupt
        finally:
            for number, handler in before.items():
                deaf = number == signal.SIGTERM and interrupt.ending and launched()
                signal.signal(number, signal.SIG_IGN if deaf else handler)


@contextmanager
def _ended_by_the_second() -> Iterator[None]:
    """A thread counts the signals: Python hears two of them as one while an engine computes."""
    heard, told = os.pipe()
    os.set_blocking(told, False)
    before, done = signal.set_wakeup_fd(told, warn_on_full_buffer=False), threading.Event()

    def count() -> None:
        presses = 0
        while number := os.read(heard, 1):
            presses += number[0] == signal.SIGINT
            if presses == 2:
                if not done.wait(GRACE):
                    os.write(2, LAST_WORDS)
                    os._exit(130)
                return

    counter = threading.Thread(target=count, name="interrupt", daemon=True)
    counter.start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(before)
        os.close(told)
        counter.join()
        os.close(heard)
