"""Many conversations refined: logs in several processes where there is much to do, files one row after the other."""

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from mlx_finetune.data.collection import Kept, Place, Secret, Unit, key_of
from mlx_finetune.data.conversation import Conversation
from mlx_finetune.data.pool import chunks, spread, workers
from mlx_finetune.data.refine import MARK, Refined, Settings, refine, without_secrets
from mlx_finetune.data.sources import BadLine, Item, Rejected, chat_formats, openassistant
from mlx_finetune.data.sources import gptme as gptme_source

TOKEN_LIKE = re.compile(r"[A-Za-z0-9_\-/+=]{24,}")  # what may be a secret of which a reason holds only the beginning
MUCH = 32 * 2**20  # bytes of logs from which starting processes pays
CHUNK = 2 * 2**20  # bytes of logs that one process takes at a time
NAMED_BAD_LINES = 20  # of one log or file; the others are counted


class Advance(Protocol):
    """Told how many bytes are done of how many."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@dataclass(frozen=True)
class Work:
    """What refining takes. `key`: see `refine`; `spool`: a folder in which every process puts texts aside in a file of its own."""

    settings: Settings
    key: bytes
    spool: str


class _Spool:
    """Appends to this process's file."""

    def __init__(self, folder: str) -> None:
        self._path = str(Path(folder) / str(os.getpid()))

    def __enter__(self) -> "_Spool":
        self._file = open(self._path, "ab")  # noqa: PTH123
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, raw: bytes) -> Place:
        """Where it lies."""
        start = self._file.tell()
        self._file.write(raw)
        return self._path, start, len(raw)


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
        """Changes when a file does, not where all of it is moved; empty for a hub id."""
        files = [(os.path.relpath(place, self.name), size, time) for place, size, time in self._files()]
        return hashlib.blake2b(repr(files).encode("utf-8", errors="replace"), digest_size=16).hexdigest() if files else ""

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


def refine_logs(logs: Sequence[gptme_source.Log], work: Work) -> Iterator[Unit]:
    """One unit a log, in order."""
    parts = chunks(logs, lambda log: log.size, CHUNK)
    refine_chunk = partial(_refine_chunk, work=work)
    alone = workers() == 1 or sum(log.size for log in logs) < MUCH
    for units in map(refine_chunk, parts) if alone else spread(refine_chunk, parts, "collect"):
        yield from units


def _refine_chunk(logs: Iterable[gptme_source.Log], work: Work) -> list[Unit]:
    with _Spool(work.spool) as spool:
        return [_unit(log.name, log.stamp, gptme_source.read_log(log), work, spool) for log in logs]


def refine_file(source: FileSource, work: Work) -> Unit:
    """All of one file; only texts that are put aside are not held."""
    with _Spool(work.spool) as spool:
        return _unit(source.name, source.stamp, source.items(), work, spool)


def _unit(name: str, stamp: str, items: Iterable[Item], work: Work, spool: _Spool) -> Unit:
    kept: list[Kept] = []
    rejected: list[Rejected] = []
    bad_lines: list[BadLine] = []
    more = 0
    for item in items:
        one = refine(item, work.settings, work.key) if isinstance(item, Conversation) else item
        if isinstance(one, Refined):
            kept.append(Kept(one.name, one.source, one.head, spool.put(one.body), one.print, one.counts, one.secrets))
        elif isinstance(one, Rejected):
            shown = without_secrets(one.id, work.settings.redaction)
            rejected.append(replace(one, id=shown, reason=_reason(one.reason, work.settings)))
        elif len(bad_lines) < NAMED_BAD_LINES:
            shown = without_secrets(str(one.path), work.settings.redaction)
            bad_lines.append(BadLine(Path(shown), one.line, _reason(one.reason, work.settings)))
        else:
            more += 1
    return Unit(key_of(name), stamp, tuple(kept), tuple(rejected), tuple(bad_lines), more)


def _reason(reason: str, settings: Settings) -> str:
    """Without secrets, also those of which it shows only a part."""
    if not settings.redaction:
        return reason
    return TOKEN_LIKE.sub(lambda match: match[0][:4] + "…", without_secrets(reason, settings.redaction))


def number_secrets(text: str, own: Sequence[Secret], placeholders: Mapping[bytes, str]) -> str:
    """Each mark of a secret becomes its placeholder in the whole collection; `placeholders` by the digests of secrets."""

    def placeholder(match: re.Match[str]) -> str:
        place = int(match[2])
        known = place < len(own) and own[place][0] == match[1]  # else the text held such characters itself
        return placeholders[own[place][1]] if known else match[0]

    return MARK.sub(placeholder, text)
