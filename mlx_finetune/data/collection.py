"""The folder that `collect` makes, as the next run of `collect` sees it: what was read, and where its text lies."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlx_finetune.data.fingerprint import Fingerprint
from mlx_finetune.data.sources import BadLine, Rejected
from mlx_finetune.data.tags import read_tags
from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_file, read_json, refuse_existing
from mlx_finetune.reading import is_file_name, lines_of, open_ordinary

VERSION = 3
LONGEST_UNIT = 256 * 2**20  # bytes of a line of the index: one file of a million conversations
SOURCES = ("gptme", "openassistant", "chat")
TAGS = "tags.yaml"
INDEX = "index.ndjson"  # no .jsonl: it holds no conversations
Place = tuple[str, int, int]  # file, first byte and bytes of the second half of a line
Secret = tuple[str, bytes]  # kind and keyed digest


@dataclass(frozen=True, slots=True)
class Kept:
    """One conversation whose text lies on the disk. `head` and the text at `place` are the two halves of its line.

    `secrets` stand in the text under their places in this tuple, until the whole collection gives them their numbers.
    """

    name: str
    source: str
    head: str
    place: Place
    print: Fingerprint
    counts: Counter[str]
    secrets: tuple[Secret, ...] = ()


@dataclass(frozen=True, slots=True)
class Unit:
    """All that came of one log or one file. `stamp` changes when the file does; empty where that cannot be known.

    `key` stands for the name, which may say who the person is.
    """

    key: str
    stamp: str
    kept: tuple[Kept, ...]
    rejected: tuple[Rejected, ...] = ()
    bad_lines: tuple[BadLine, ...] = ()
    more_bad_lines: int = 0  # beyond those that are named


def key_of(name: str) -> str:
    """The key of a unit."""
    return hashlib.blake2b(name.encode("utf-8", errors="replace"), digest_size=16).hexdigest()


class Bodies:
    """Reads second halves of lines; each file stays open for the next one."""

    def __init__(self) -> None:
        self._files: dict[str, IO[bytes]] = {}

    def read(self, place: Place) -> bytes:
        """The bytes at `place`."""
        path, start, length = place
        if path not in self._files:
            self._files[path] = Path(path).open("rb")  # noqa: SIM115  closed by `close`
        self._files[path].seek(start)
        return self._files[path].read(length)

    def close(self) -> None:
        """Lets go of the files."""
        for file in self._files.values():
            file.close()


def stamps_digest(stamps: Iterable[tuple[str, str]]) -> str:
    """Tells one state of the sources from another."""
    digest = hashlib.blake2b(digest_size=16)
    for name, stamp in stamps:
        digest.update(f"{name}\0{stamp}\n".encode("utf-8", errors="replace"))
    return digest.hexdigest()


def write_index(path: Path, units: Iterable[Unit], written: Mapping[int, Place]) -> None:
    """One line a unit. `written`: where conversations (by the id of their `Kept`) stand unchanged, so that they can serve again."""
    with atomic_file(path) as file:
        for unit in units:
            again = bool(unit.stamp) and all(id(kept) in written and not kept.secrets for kept in unit.kept)
            row: dict[str, Any] = {"unit": unit.key, "stamp": unit.stamp if again else ""}
            if again:
                row["kept"] = [_kept_row(kept, written[id(kept)]) for kept in unit.kept]
                row["rejected"] = [one.to_json() for one in unit.rejected]
                row["bad_lines"] = [[str(bad.path), bad.line, bad.reason] for bad in unit.bad_lines]
                row["more_bad_lines"] = unit.more_bad_lines
            file.write(json.dumps(row, ensure_ascii=True) + "\n")


def _kept_row(kept: Kept, place: Place) -> dict[str, Any]:
    print_ = kept.print.to_json()
    return {"name": kept.name, "source": kept.source, "head": kept.head, "start": place[1], "length": place[2], "print": print_} | {
        "counts": dict(kept.counts)
    }


def read_index(folder: Path) -> Iterator[Unit]:
    """The units of an earlier run that can serve again as they are.

    Raises:
        UserError: the index was changed or is not whole.
    """
    path = folder / INDEX
    try:
        with open_ordinary(path) as file:
            for line in lines_of(file, LONGEST_UNIT):
                row = json.loads(line.raw or b"")
                if row["stamp"]:
                    yield _unit(row, folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be used: {error}", hint="collect into another --out") from error


def _unit(row: dict[str, Any], folder: Path) -> Unit:
    for one in row["kept"]:
        numbers = one["start"], one["length"], *one["counts"].values()
        if one["source"] not in SOURCES or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a conversation whose place makes no sense")
    kept = tuple(
        Kept(
            one["name"],
            one["source"],
            one["head"],
            (str(folder / f"{one['source']}.jsonl"), one["start"], one["length"]),
            Fingerprint.from_json(one["print"]),
            Counter(one["counts"]),
        )
        for one in row["kept"]
    )
    rejected = tuple(Rejected(**one) for one in row["rejected"])
    bad_lines = tuple(BadLine(Path(path), line, reason) for path, line, reason in row["bad_lines"])
    return Unit(row["unit"], row["stamp"], kept, rejected, bad_lines, row["more_bad_lines"])


@dataclass(frozen=True)
class Earlier:
    """collect.json of an earlier run at the same place, and what was asked otherwise then: names of settings."""

    summary: Mapping[str, Any]
    changed: tuple[str, ...]


def earlier_collection(folder: Path, asked: Mapping[str, Any]) -> Earlier | None:
    """What an earlier run left at `folder`; None where nothing is there.

    Raises:
        UserError: something else is there, it was edited, or it holds a source that is not asked for now.
    """
    if not os.path.lexists(folder):  # Path's raises for what may not be looked at
        return None
    summary = _earlier_summary(folder)
    if summary is None:
        refuse_existing(folder)
    assert summary is not None
    _refuse_lost_tags(folder, summary, asked["settings"]["selection"]["tags"])
    for part, value in summary["sources"].items():
        now = asked["sources"].get(part)
        if part == "openassistant_options" or value in (now, None):
            continue
        held, read = (each if isinstance(each, list) else [each] for each in (value, now))
        lost = [one for one in held if one not in read]
        if lost:
            hint = "name it again, choose another --out, or move the old one away"
            raise UserError(f"{folder} exists already, and holds {lost[0]}, which is not read now", hint=hint)
    then = summary["settings"] | {"openassistant": summary["sources"].get("openassistant_options")}
    now = asked["settings"] | {"openassistant": asked["sources"].get("openassistant_options")}
    return Earlier(summary, tuple(name for name, value in now.items() if then.get(name) != value))


def _refuse_lost_tags(folder: Path, summary: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
    path = folder / TAGS
    if path.is_file() and summary.get("tags") != digest_of(path) and read_tags(path) != tags:
        raise UserError(f"{path} was edited, which says nothing by itself", hint=f"apply it with --tags {path} --update")


def digest_of(path: Path) -> str:
    """Tells one content of a small file from another."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _earlier_summary(folder: Path) -> dict[str, Any] | None:
    """collect.json of a whole collection whose files are as they were written; else None.

    Raises:
        UserError: another version made it.
    """
    found = read_json(folder / "collect.json") if (folder / "collect.json").is_file() else None
    summary: dict[str, Any] = found if isinstance(found, dict) else {}
    version = summary.get("version")
    if type(version) is int and version != VERSION:
        message = f"{folder} exists already, collected as version {version} does; this one makes version {VERSION}"
        raise UserError(message, hint="choose another --out, or move the old one away")
    if version != VERSION or not isinstance(summary.get("state"), str) or not (folder / INDEX).is_file():
        return None
    if not all(isinstance(summary.get(key), dict) for key in ("files", "sources", "settings")):
        return None
    if not all(is_file_name(name, "") for name in summary["files"]):
        return None
    return summary if summary["files"] == file_stamps(folder, summary["files"]) else None


def file_stamps(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Size and time of each file; a missing one has none."""
    paths = {name: folder / name for name in names}
    return {name: [path.stat().st_size, path.stat().st_mtime_ns] for name, path in paths.items() if path.is_file()}
