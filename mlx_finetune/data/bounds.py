"""What a stranger's chat template may cost: checked beforehand where one instruction can cost much, and else by a timer."""

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any

from jinja2.exceptions import SecurityError

from mlx_finetune.errors import UserError

MOST = 10**6  # of a count or width that a template may ask for; templates write up to 80
MOST_TEXT = 2**24  # characters, or items of a list, that a product makes
MOST_BITS = 4096  # of a number
SECONDS, GROWTH, LOOK = 20, 2**30, 0.1  # of one thread; bytes of memory; seconds between two looks
WIDTH = re.compile(r"\d{7,}|%[^%a-zA-Z]*\*")  # in a format: a width of millions, or one that an argument says
WIDE_FILTERS = ("batch", "center", "format", "indent", "replace", "slice", "truncate", "wordwrap")


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Of `*`, `**` and `%`; raises SecurityError where the result would be huge."""
    if operator == "%":
        if isinstance(left, str):
            check_format(left)
        return
    if operator == "**":
        too_large = isinstance(left, int) and isinstance(right, int) and abs(right) * max(left.bit_length(), 1) > MOST_BITS
    else:
        too_large = _product(left, right) or _product(right, left)
    if too_large:
        raise SecurityError(f"a chat template may not compute so large a value with {operator}")


def _product(left: Any, right: Any) -> bool:
    if not isinstance(right, int):
        return False
    if isinstance(left, int):
        return left.bit_length() + right.bit_length() > MOST_BITS
    return isinstance(left, str | bytes | list | tuple) and len(left) * right > MOST_TEXT


def check_arguments(*args: Any, **kwargs: Any) -> None:
    """Raises SecurityError where one is a count or width beyond all use."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > MOST:
            raise SecurityError("a chat template may not ask for so many or so wide a text")


def check_format(text: str) -> None:
    """Raises SecurityError where a format asks for a width beyond all use."""
    if WIDTH.search(text):
        raise SecurityError("a chat template may not ask for so wide a text")


def check_method(text: str, name: str, args: Sequence[Any]) -> None:
    """Of a text; raises SecurityError where the result would be huge."""
    if name.startswith("format"):
        check_format(text)
    elif name == "replace" and len(args) > 1 and isinstance(args[0], str) and len(text) * len(str(args[1])) > MOST_TEXT:
        if (text.count(args[0]) + 1) * len(str(args[1])) > MOST_TEXT:
            raise SecurityError("a chat template may not make so long a text")
    elif name == "join" and args and hasattr(args[0], "__len__") and len(text) * len(args[0]) > MOST_TEXT:
        raise SecurityError("a chat template may not make so long a text")


def bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter with its arguments checked."""

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_arguments(*args, **kwargs)
        texts = [value for value in args if isinstance(value, str)]  # the first of all may be Jinja's own
        if texts and function.__name__ in ("do_format", "do_replace"):
            check_method(texts[0], function.__name__.removeprefix("do_"), texts[1:])
        return function(*args, **kwargs)

    return checked


@contextmanager
def in_bounds(place: str) -> Iterator[None]:
    """Ends what runs in it after some seconds of computing, or where the memory grows by a gigabyte.

    By a timer of the operating system, which only the main thread of a program can set: elsewhere nothing is watched.

    Raises:
        UserError: it came to that.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
        yield
        return
    import psutil

    process = psutil.Process()
    began, held = time.thread_time(), process.memory_info().rss

    def look(number: int, frame: FrameType | None) -> None:
        if time.thread_time() - began > SECONDS:
            raise UserError(f"{place}: its chat template computes for more than {SECONDS} s", hint="choose another model")
        if process.memory_info().rss - held > GROWTH:
            raise UserError(f"{place}: its chat template takes more than {GROWTH >> 30} GB", hint="choose another model")

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, LOOK, LOOK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
