"""Work spread over helper processes, its results in order."""

import gc
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from mlx_finetune.errors import UserError

Given = TypeVar("Given")
Made = TypeVar("Made")

MOST_WORKERS = 4


def workers() -> int:
    """How many helper processes this machine has use for."""
    return min(os.cpu_count() or 1, MOST_WORKERS)


def spread(
    function: Callable[[Given], Made],
    given: Iterable[Given],
    again: str,
    prepare: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Generator[Made]:
    """`function` of each one that is given, made in helper processes and few at a time ahead; `again` names the verb.

    Each helper calls `prepare` with `arguments` once, before everything else; they go through a pipe that holds little.

    Raises:
        UserError: as `function` does; or a helper was ended from outside.
    """
    waiting: deque[Future[Made]] = deque()
    pool = ProcessPoolExecutor(workers(), get_context("spawn"), initializer=_start, initargs=(prepare, arguments))
    try:
        for one in given:
            waiting.append(pool.submit(function, one))
            if len(waiting) > 2 * workers():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        message = "a helper process was ended from outside, perhaps for want of memory"
        raise UserError(message, hint=f"close other programs and {again} again") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """Interrupts are for the parent; one thread a helper; what is imported need not be looked through for garbage."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if prepare:
        prepare(*arguments)
    gc.freeze()
    gc.set_threshold(5_000, 50, 100)


def chunks(items: Iterable[Given], size: Callable[[Given], int], at_least: int) -> Iterator[list[Given]]:
    """The items one after the other, as many together as are `at_least` so large."""
    chunk: list[Given] = []
    so_far = 0
    for item in items:
        chunk.append(item)
        so_far += size(item)
        if so_far >= at_least:
            yield chunk
            chunk, so_far = [], 0
    if chunk:
        yield chunk
