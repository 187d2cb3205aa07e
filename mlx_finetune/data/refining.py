"""Many conversations refined: logs in several processes where there is much to do, files one row after the other."""

import gc
import os
import re
import signal
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, Protocol

from mlx_finetune.data.conversation import Conversation
from mlx_finetune.data.refine import CLOSE, OPEN, Refined, Settings, refine
from mlx_finetune.data.sources import BadLine, Item, Rejected, chat_formats, openassistant
from mlx_finetune.data.sources import gptme as gptme_source
from mlx_finetune.errors import UserError

MARK = re.compile(f"{OPEN}([a-z0-9_]+):([0-9]+){CLOSE}")
MUCH = 32 * 2**20  # bytes of logs from which starting processes pays
CHUNK = 2 * 2**20  # bytes of logs that one process takes at a time
MOST_WORKERS = 4
PART = 500  # conversations of a file that are held at a time
NAMED_BAD_LINES = 20  # of one log or file; the others are counted


class Advance(Protocol):
    """Told how many bytes are done of how many."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@dataclass(frozen=True)
class Result:
    """All that came of one log, or of a part of a file."""

    name: str
    stamp: str
    refined: tuple[Refined, ...]
    rejected: tuple[Rejected, ...]
    bad_lines: tuple[BadLine, ...]
    more_bad_lines: int


@dataclass(frozen=True)
class FileSource:
    """An OpenAssistant or chat file, folder or hub id."""

    name: str
    source: Literal["openassistant", "chat"]
    options: openassistant.Options | None = None

    @property
    def size(self) -> int:
        """Bytes, as far as they are known."""
        return sum(size for _, size, _ in self._files())

    @property
    def stamp(self) -> str:
        """Changes when a file does; empty for a hub id."""
        files = self._files()
        return repr(files) if files else ""

    def _files(self) -> list[tuple[str, int, int]]:
        """Name, bytes and time of each file, none behind a link in a folder; what cannot be looked at its reader will name."""
        path, found = Path(self.name), []
        places = [path]
        for folder, _, names in os.walk(path):  # follows no links
            places += [Path(folder, name) for name in names]
        for place in places:
            with suppress(OSError):
                status = place.stat(follow_symlinks=place == path)
                if stat.S_ISREG(status.st_mode):
                    found.append((str(place), status.st_size, status.st_mtime_ns))
        return sorted(found)

    def items(self) -> Iterator[Item]:
        """What its reader gives."""
        if self.source == "chat":
            return chat_formats.read(self.name)
        return openassistant.read(self.name, self.options or openassistant.Options())


def refine_logs(logs: Sequence[gptme_source.Log], settings: Settings, key: bytes) -> Iterator[Result]:
    """One result a log, in order."""
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    if workers == 1 or sum(log.size for log in logs) < MUCH:
        for log in logs:
            yield _refine_log(log, settings, key)
        return
    waiting: deque[Future[list[Result]]] = deque()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_helper)
    try:
        for chunk in _chunks(logs):
            waiting.append(pool.submit(_refine_chunk, chunk, settings, key))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        message = "a helper process was ended from outside, perhaps for want of memory"
        raise UserError(message, hint="close other programs and collect again") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start_helper() -> None:
    """Interrupts are for the parent; and garbage in circles, which refining hardly makes, is looked for seldom (8 % faster)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.set_threshold(100_000, 50, 100)


def _chunks(logs: Iterable[gptme_source.Log]) -> Iterator[list[gptme_source.Log]]:
    chunk: list[gptme_source.Log] = []
    size = 0
    for log in logs:
        chunk.append(log)
        size += log.size
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _refine_chunk(logs: Iterable[gptme_source.Log], settings: Settings, key: bytes) -> list[Result]:
    return [_refine_log(log, settings, key) for log in logs]


def _refine_log(log: gptme_source.Log, settings: Settings, key: bytes) -> Result:
    return _result(log.name, log.stamp, gptme_source.read_log(log), settings, key)


def refine_file(source: FileSource, settings: Settings, key: bytes) -> Iterator[Result]:
    """Results of some conversations each, so that no more is held at a time."""
    items = source.items()
    while part := list(islice(items, PART)):
        yield _result(source.name, "", part, settings, key)


def _result(name: str, stamp: str, items: Iterable[Item], settings: Settings, key: bytes) -> Result:
    refined: list[Refined] = []
    rejected: list[Rejected] = []
    bad_lines: list[BadLine] = []
    more = 0
    for item in items:
        one = refine(item, settings, key) if isinstance(item, Conversation) else item
        if isinstance(one, Refined):
            refined.append(one)
        elif isinstance(one, Rejected):
            rejected.append(one)
        elif len(bad_lines) < NAMED_BAD_LINES:
            bad_lines.append(one)
        else:
            more += 1
    return Result(name, stamp, tuple(refined), tuple(rejected), tuple(bad_lines), more)


def number_secrets(text: str, own: Sequence[tuple[str, bytes]], numbers: Mapping[tuple[str, bytes], int]) -> str:
    """Each mark of a secret becomes its placeholder, with the number that it has in the whole collection."""

    def placeholder(match: re.Match[str]) -> str:
        place = int(match[2])
        known = place < len(own) and own[place][0] == match[1]  # else the text held such characters itself
        return f"[REDACTED:{match[1]}:{numbers[own[place]]}]" if known else match[0]

    return MARK.sub(placeholder, text)
