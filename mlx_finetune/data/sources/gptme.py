"""gptme's own logs of every version since 2023, read as gptme would send them to a server.

Source: gptme 0.35.1, logmanager/manager.py (`_gen_read_jsonl`, `prepare_messages`), dirs.py (`get_logs_dir`) and its history:
`<name>/conversation.jsonl` since 2023-09, one `YYYY-MM-DD.log` a day before; `lossless.jsonl` holds the whole conversation where
the person compacted it by hand. Views, events and checkpoints are second copies and are left alone.
"""

import errno
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlx_finetune.data.conversation import Conversation, Message
from mlx_finetune.data.sources import Item, Rejected, printable
from mlx_finetune.data.sources.gptme_branches import branches_of, identity, is_taken_back, keys_of, read_compacted
from mlx_finetune.data.sources.gptme_config import chat_config
from mlx_finetune.data.sources.gptme_messages import Entry, as_sent, read_entries
from mlx_finetune.data.tool_calls import FORMATS, format_against, format_of
from mlx_finetune.errors import UserError

SOURCE = "gptme"
DAY = re.compile(r"\d{4}-\d{2}-\d{2}(?!\d)", re.ASCII)  # with which gptme begins most names
FOLDER_HINT = "pass the folder that holds gptme's conversations, or set GPTME_LOGS_HOME to it"


@dataclass(frozen=True, slots=True)
class Log:
    """One conversation on the disk: small, for a person may have tens of thousands."""

    name: str
    place: str  # its file of messages
    in_folder: bool  # with others of its own; a `.log` file of 2023 stands alone
    size: int  # bytes of that file
    stamp: str  # changes when one of its files does

    @property
    def path(self) -> Path:
        """The file of messages."""
        return Path(self.place)

    @property
    def folder(self) -> Path | None:
        """Where its other files lie."""
        return self.path.parent if self.in_folder else None


def default_logs_folder(environment: Mapping[str, str], home: Path, platform: str) -> Path:
    """Where gptme keeps its logs, by its own rules; `platform` is a `sys.platform`. The folder need not exist."""
    if logs := environment.get("GPTME_LOGS_HOME", "").strip():
        return Path(logs)
    if data := environment.get("XDG_DATA_HOME", "").strip():
        return Path(data) / "gptme" / "logs"
    share = home / ".local" / "share" / "gptme"
    if platform == "darwin" and not share.exists():
        return home / "Library" / "Application Support" / "gptme" / "logs"
    return share / "logs"


def read(folder: Path) -> Iterator[Item]:
    """Every log of a logs folder in order of name, one by one; what cannot be read is named and never fatal.

    The messages before each assistant turn are those that gptme sent, but for what meta["not_reproduced"] names: native tool
    calls (call_id), a prompt that was replaced later (prompt_generation), messages that expire (ephemeral_ttl), and attachments
    of which the log keeps no text.

    Raises:
        UserError: there is no such folder, or no conversation lies in it.
    """
    logs, skipped = find_logs(folder)
    yield from skipped
    for log in logs:
        yield from read_log(log)


def find_logs(folder: Path) -> tuple[list[Log], list[Rejected]]:
    """The logs in order of name, and what looks like one and is not read: links, pipes, what may not be opened.

    Raises:
        UserError: there is no such folder, or no conversation lies in it.
    """
    logs: list[Log] = []
    skipped: list[Rejected] = []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        reason = "no such folder" if error.errno == errno.ENOENT else error.strerror
        raise UserError(f"{folder}: {reason}", hint=FOLDER_HINT) from error
    for entry in entries:
        try:
            found = _log(entry)
        except OSError as error:
            skipped.append(Rejected(printable(entry.name), SOURCE, f"cannot be read: {error.strerror}"))
        else:
            logs += [found] if found else []
    if not logs and not skipped:
        if (folder / "conversation.jsonl").exists():
            raise UserError(f"{folder} is one conversation, not a logs folder", hint=f"pass {folder.absolute().parent}")
        raise UserError(f"{folder}: no */conversation.jsonl in it", hint=FOLDER_HINT)
    return logs, skipped


def _log(entry: os.DirEntry[str]) -> Log | None:
    """Raises OSError where the entry is a log that cannot be read, or a link to one."""
    if entry.is_file(follow_symlinks=False):
        status = entry.stat(follow_symlinks=False)
        stem, dot, suffix = entry.name.rpartition(".")
        stamp = f"{status.st_size}:{status.st_mtime_ns}"
        return Log(stem, entry.path, False, status.st_size, stamp) if dot and suffix == "log" else None
    if entry.is_symlink():
        if (Path(entry.path) / "conversation.jsonl").exists():
            raise OSError(0, "a link, not followed", entry.path)
        return None
    if not entry.is_dir(follow_symlinks=False):
        return None
    with os.scandir(entry.path) as inside:
        files = {one.name: one for one in inside}
    main = files.get("lossless.jsonl") or files.get("conversation.jsonl")
    if main is None:
        return None
    parts = [main, *(files[name] for name in ("conversation.jsonl", "config.toml", "files") if files.get(name, main) is not main)]
    stamps = [(one.name, status.st_size, status.st_mtime_ns) for one in parts for status in (one.stat(follow_symlinks=False),)]
    for branch in branches_of(Path(entry.path))[0] if "branches" in files else ():
        status = branch.lstat()
        stamps.append((branch.name, status.st_size, status.st_mtime_ns))
    stamp = hashlib.blake2b(repr(stamps).encode("utf-8", errors="replace"), digest_size=12).hexdigest()
    return Log(entry.name, main.path, True, stamps[0][1], stamp)


def read_log(log: Log) -> Iterator[Item]:
    """The conversation of one log, before it the lines of it that cannot be read, and after it its branches.

    A branch that holds only what the person took back is Rejected; any other is a conversation of the same group.
    """
    path, folder = log.path, log.folder
    branches, bad_branches = branches_of(folder) if folder else ([], [])
    try:
        compacted = folder if path.name == "lossless.jsonl" else None
        entries, bad_lines = read_compacted(compacted, branches) if compacted else read_entries(path)
        chat, bad_config = chat_config(folder / "config.toml") if folder else ({}, [])
    except OSError as error:
        yield Rejected(printable(log.name), SOURCE, f"cannot be read: {error.strerror}")
        return
    yield from bad_lines + bad_config + bad_branches
    yield _conversation(log, "", entries, chat)
    if branches:
        yield from _read_branches(log, branches, entries, chat)


def _read_branches(log: Log, branches: Sequence[Path], entries: Sequence[Entry], chat: Mapping[str, Any]) -> Iterator[Item]:
    known = set(keys_of(entries))
    copies = {identity(entry) for entry in entries if entry.timestamp}
    for path in branches:
        name = f"{printable(log.name)}#{printable(path.stem)}"
        try:
            branch, bad_lines = read_entries(path)
        except OSError as error:
            yield Rejected(name, SOURCE, f"cannot be read: {error.strerror}")
            continue
        yield from bad_lines
        keys = keys_of(branch)
        turns = [(key, identity(entry)) for key, entry in zip(keys, branch, strict=True) if entry.role == "assistant"]
        new = any(key not in known and copy not in copies for key, copy in turns)
        known.update(keys)
        if new and is_taken_back(path):
            yield Rejected(name, SOURCE, "undone: the person took these turns back")
        elif new:
            yield _conversation(log, path.stem, branch, chat)


def _conversation(log: Log, branch: str, entries: Sequence[Entry], chat: Mapping[str, Any]) -> Conversation:
    said = {key: printable(value) for key, value in chat.items() if isinstance(value, str) and value}
    sent = as_sent(entries, log.folder, said.get("workspace", ""))
    name = printable(log.name)
    model = said.get("model") or next((entry.model for entry in entries if entry.model), None)
    models = [entry.model or model for entry in sent if entry.role == "assistant"]
    meta = {
        "name": f"{name}#{printable(branch)}" if branch else name,
        "title": said.get("name"),
        "tool_format": _tool_format(said.get("tool_format", ""), sent),
        "model": model,
        "turn_models": models if set(models) - {model} else None,  # until it is chosen by them (select.py)
        "time": _time(entries, log),
        "begun": _begun(entries),
        "tools": [tool for tool in _list(chat.get("tools")) if isinstance(tool, str)],
        "interactive": chat["interactive"] if isinstance(chat.get("interactive"), bool) else None,
        "not_reproduced": sorted({what for entry in sent for what in entry.not_reproduced}),
    }
    return Conversation(
        messages=tuple(Message(entry.role, entry.content, tool_call_id=entry.call_id or "") for entry in sent),
        source=SOURCE,
        group=name,
        license="private",
        meta={key: value for key, value in meta.items() if value not in (None, [], "")},
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _tool_format(stated: str, sent: Sequence[Entry]) -> str | None:
    """As the config has it, unless every call that has a result is in one other format."""
    if stated not in FORMATS:
        return format_of(entry.content for entry in sent if entry.role == "assistant")
    ran = (turn.content for turn, after in pairwise(sent) if turn.role == "assistant" and after.role == "system")
    return format_against(ran, stated) or stated


def _time(entries: Sequence[Entry], log: Log) -> str:
    """When the last message was written, in UTC. gptme writes most times naive, in local time; logs of 2023 have none.

    Of a log without times it is the day in its name, and the file's time only where there is none.
    """
    last: dict[str, str] = {}  # of those of one offset the greatest text is the latest
    for entry in entries:
        offset = entry.timestamp[-6:] if entry.timestamp[-6:-5] in ("+", "-") else ""
        if _moment_like(entry.timestamp) and entry.timestamp > last.get(offset, ""):
            last[offset] = entry.timestamp
    times = [moment for timestamp in last.values() if (moment := _moment(timestamp))]
    named = DAY.match(log.name)
    day = _moment(f"{named[0]}T00:00:00+00:00") if named else None
    latest = max(times) if times else day or datetime.fromtimestamp(log.path.lstat().st_mtime, UTC)
    return latest.strftime("%Y-%m-%dT%H:%M:%SZ")


def _begun(entries: Sequence[Entry]) -> str | None:
    """When the first message was written, in UTC: it stays when the person goes on with the log."""
    moment = _moment(entries[0].timestamp) if entries else None
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ") if moment else None


def _moment_like(timestamp: str) -> bool:
    return timestamp[:4].isdigit() and timestamp[4:5] == "-" and timestamp[10:11] in ("T", " ")


def _moment(timestamp: str) -> datetime | None:
    try:
        return datetime.fromisoformat(timestamp).astimezone(UTC)
    except (ValueError, OverflowError, OSError):  # no date; or one before 1970 or after 9999, which has no local time
        return None
