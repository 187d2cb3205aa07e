"""What a person took back: branches that gptme keeps of it, and where it stands in a log that was compacted by hand.

Source: gptme 0.35.1, logmanager/manager.py (`_save_backup_branch`, `undo`, `append`), commands/base.py, util/content.py. Before
it compacts, gptme copies conversation.jsonl to lossless.jsonl; from then on both get every message, but /undo, /edit and the
removal of a command touch only conversation.jsonl.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import dropwhile, takewhile
from pathlib import Path

from mlx_finetune.data.sources import BadLine, Item
from mlx_finetune.data.sources.gptme_messages import Entry, read_entries
from mlx_finetune.data.tool_calls import ALIASES, DEFAULT_TOOLS

TAKEN_BACK = re.compile(r"-(?:undo|edit)-\d+\Z")  # what /undo and /edit make of the name of the branch that they change
SENT_TOO = DEFAULT_TOOLS | set(ALIASES) | {"impersonate", "rag"}  # commands that stay in a log
COUNT = re.compile(r"/undo\s+([0-9]{1,9})\b")

Identity = tuple[str, str, str]  # of a message: its role, content and time


def branches_of(folder: Path) -> tuple[list[Path], list[Item]]:
    """The files of its branches, first those that the person kept, each kind in order of name; or why they cannot be read."""
    place = folder / "branches"
    try:
        if place.is_symlink():
            raise OSError(0, "a link, not followed", str(place))
        with os.scandir(place) as entries:
            found = [Path(entry.path) for entry in entries if entry.name.endswith(".jsonl")]
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [BadLine(place, 0, f"cannot be read: {error.strerror}")]
    return sorted(found, key=lambda path: (is_taken_back(path), path.name)), []


def is_taken_back(path: Path) -> bool:
    """Whether a branch holds what /undo or /edit took out of another one."""
    return bool(TAKEN_BACK.search(path.stem))


def keys_of(entries: Sequence[Entry]) -> list[bytes]:
    """For each message a key of it and all before it: equal keys, equal beginnings."""
    keys, chain = [], hashlib.blake2b(digest_size=16)
    for entry in entries:
        chain.update(f"{entry.role} {len(entry.content)} {entry.content}".encode())
        keys.append(chain.digest())
    return keys


def identity(entry: Entry) -> Identity:
    """Equal for copies of one message, wherever they stand."""
    return entry.role, entry.content, entry.timestamp


def read_compacted(folder: Path, branches: Iterable[Path]) -> tuple[list[Entry], list[Item]]:
    """The whole log without what was taken back; conversation.jsonl as it is where lossless.jsonl is of no use.

    Raises:
        OSError: neither can be read.
    """
    whole, bad_lines = _entries_or_reason(folder / "lossless.jsonl")
    if not whole:
        bad_lines = bad_lines or [BadLine(folder / "lossless.jsonl", 0, "holds no message: conversation.jsonl is read instead")]
        entries, more = read_entries(folder / "conversation.jsonl")
        return entries, bad_lines + more
    active, more = _entries_or_reason(folder / "conversation.jsonl") if (folder / "conversation.jsonl").exists() else ([], [])
    backups = [_entries_or_reason(path)[0] for path in branches if is_taken_back(path)]
    return _not_taken_back(whole, active, backups), bad_lines + more


def _entries_or_reason(path: Path) -> tuple[list[Entry], list[Item]]:
    try:
        return read_entries(path)
    except OSError as error:
        return [], [BadLine(path, 0, f"cannot be read: {error.strerror}")]


def _not_taken_back(whole: Sequence[Entry], active: Sequence[Entry], backups: Sequence[Sequence[Entry]]) -> list[Entry]:
    """What conversation.jsonl still holds, or held when it was compacted last."""
    places = {identity(entry): place for place, entry in enumerate(whole)}
    present = {identity(entry) for entry in active}
    undone = {identity(entry) for backup in backups for entry in backup}
    gone = {place for place in _popped(whole) if not backups or identity(whole[place]) in undone}
    if active:
        gone |= _gaps(places, active, len(whole)) | _in_backups(places, active, backups)
    kept = []
    for place, entry in enumerate(whole):
        command = _command_of(entry)
        if identity(entry) in present or not (place in gone or (command and command not in SENT_TOO)):
            kept.append(entry)
    return kept


def _command_of(entry: Entry) -> str:
    """The name of the /command that it is, by gptme's rule (/home/me is none), else ""."""
    if entry.role != "user" or not entry.content.startswith("/"):
        return ""
    first = entry.content.split(maxsplit=1)[0]
    return first[1:] if first.count("/") == 1 else ""


def _popped(whole: Sequence[Entry]) -> set[int]:
    """What its own /undo commands took out. (Each takes one message more than it is told: the command's own removal.)"""
    there: list[int] = []
    popped: set[int] = set()
    for place, entry in enumerate(whole):
        command = _command_of(entry)
        if command == "undo":
            told = COUNT.match(entry.content)
            keep = max(len(there) - 1 - (int(told[1]) if told else 1), 0)
            popped.update(there[keep:])
            del there[keep:]
        elif not command or command in SENT_TOO:
            there.append(place)
    return popped


def _gaps(places: Mapping[Identity, int], active: Iterable[Entry], end: int) -> set[int]:
    """What is missing between two messages that follow each other; a summary stands where compacting took messages out."""
    gaps: set[int] = set()
    before: int | None = None
    reached = -1
    for entry in active:
        place = places.get(identity(entry))
        if before is not None and place is not None:
            gaps.update(range(max(before, reached) + 1, place))
        before, reached = place, max(reached, -1 if place is None else place)
    if before is not None:
        gaps.update(range(max(before, reached) + 1, end))
    return gaps


def _in_backups(places: Mapping[Identity, int], active: Sequence[Entry], backups: Iterable[Sequence[Entry]]) -> set[int]:
    """What stands in a backup made since the log was compacted last, as its summary shows, and no longer in the log."""
    ours = [identity(entry) for entry in active]
    summary = set(takewhile(lambda one: one not in places, dropwhile(lambda one: one in places, ours)))
    gone: set[int] = set()
    for backup in backups:
        held = {identity(entry) for entry in backup}
        if summary <= held if summary else held <= places.keys():
            gone |= {places[one] for one in held - set(ours) if one in places}
    return gone
