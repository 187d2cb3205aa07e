"""What a stranger's chat template may cost: one instruction is checked beforehand, the steps of a rendering are counted.

While a model's template is opened a timer watches it too.
"""

import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any

from jinja2 import Environment
from jinja2.exceptions import SecurityError
from jinja2.nodes import EvalContext

from mlx_finetune.errors import UserError

MOST = 10**6  # of a count or width that a template may ask for; templates write up to 80
MOST_TEXT = 2**24  # characters, or items of a list, that a product makes
MOST_JOINED = 2**26  # characters that are put together
MOST_STEPS = 10**7  # of one rendering: passes through loops; what takes longer counts as several
CALL, YIELD = 10, 3
MOST_BITS = 4096  # of a number
SECONDS, GROWTH, LOOK = 20, 2**30, 0.1  # of one thread; bytes of memory; seconds between two looks
PERCENT = re.compile(r"%(\([^)]*\))?[-+ #0]*(\*|\d{7,}|\d*\.(\*|\d{7,}))")  # a width of millions, or one that an argument says
BRACES = re.compile(r"\{[^{}]*:[^{}]*(\d{7,}|\{)")
WIDE_METHODS = frozenset(("center", "expandtabs", "ljust", "rjust", "zfill"))
WIDE = "a chat template may not ask for so wide a text"
WIDE_FILTERS = ("batch", "center", "format", "indent", "replace", "slice", "truncate", "wordwrap")


class _Steps(threading.local):
    left = MOST_STEPS


_STEPS = _Steps()


def begin() -> None:
    """One rendering begins, in this thread."""
    _STEPS.left = MOST_STEPS


def spend(steps: int) -> None:
    """Raises SecurityError where a rendering has taken too many."""
    _STEPS.left -= steps
    if _STEPS.left < 0:
        raise SecurityError("a chat template may not take so many steps")


def counted(items: Any) -> Any:
    """What a loop passes through: itself where its length is known, else one that counts as it goes."""
    try:
        spend(len(items))
    except TypeError:
        return _counting(items)
    return items


def _counting(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        spend(YIELD)
        yield item


def check_size(value: Any) -> None:
    """Raises SecurityError where a text or list is longer than any chat."""
    if isinstance(value, str | list | tuple) and len(value) > MOST_JOINED:
        raise SecurityError("a chat template may not make so long a text")


def joined(parts: Iterable[str]) -> str:
    """Raises SecurityError where the text is longer than any chat."""
    if len(text := "".join(parts)) > MOST_JOINED:
        raise SecurityError("a chat template may not make so long a text")
    return text


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Of `*`, `**` and `%`; raises SecurityError where the result would be huge."""
    if operator == "%":
        if isinstance(left, str) and PERCENT.search(left):
            raise SecurityError(WIDE)
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


def check_method(text: str, name: str, args: Sequence[Any]) -> None:
    """Of a text; raises SecurityError where the result would be huge."""
    if name in WIDE_METHODS:
        check_arguments(*args)
    elif name.startswith("format") and BRACES.search(text):
        raise SecurityError(WIDE)
    elif name == "replace" and len(args) > 1 and isinstance(args[0], str) and len(text) * len(str(args[1])) > MOST_TEXT:
        if (text.count(args[0]) + 1) * len(str(args[1])) > MOST_TEXT:
            raise SecurityError("a chat template may not make so long a text")
    elif name == "join" and args and hasattr(args[0], "__len__") and len(text) * len(args[0]) > MOST_TEXT:
        raise SecurityError("a chat template may not make so long a text")


def bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter `name` with what may make its result huge checked: never the value that it is given, but for its length."""

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        own = 1 if args and isinstance(args[0], Environment | EvalContext) else 0  # Jinja's
        value, told = args[own] if len(args) > own else "", args[own + 1 :]
        if name == "replace":
            check_method(str(value), name, [str(text) for text in told[:2]])
        elif name == "format":
            check_operator("%", str(value), None)
        else:
            check_arguments(*told, **kwargs)
        return function(*args, **kwargs)

    return checked


@contextmanager
def in_bounds(place: str) -> Iterator[None]:
    """Ends what runs in it after some seconds of computing, or where the memory grows by a gigabyte.

    By a timer of the operating system, which only the main thread of a program can set, where nothing else uses it: elsewhere only
    steps are counted.

    Raises:
        UserError: it came to that.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL or signal.getitimer(signal.ITIMER_REAL)[0]:
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
