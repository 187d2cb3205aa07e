"""The messages of a gptme log, as gptme sends them: merged, without what is for the screen, with attached files in line.

Source: gptme 0.35.1, logmanager/manager.py (`_message_from_json_line`, `_active_prompt_generation`,
`_merge_consecutive_messages`) and util/context.py (`embed_attached_file_content`).
"""

import codecs
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from mlx_finetune.data.conversation import Role
from mlx_finetune.data.sources import BadLine, Item, printable
from mlx_finetune.data.sources.log_files import json_object, lines_at_once, open_regular
from mlx_finetune.reading import LONGEST_LINE, lines_of

ROLES = ("system", "user", "assistant")
PLAIN = frozenset(["role", "content", "timestamp", "pinned", "hide"])  # all that most rows have
CACHE_BOUNDARY = "# System Prompt Cache Boundary\n"  # the message with this heading is never merged
NO_HASHES: Mapping[str, str] = MappingProxyType({})
LARGEST_LOG = 128 * 2**20  # bytes of one log; beyond, it is no conversation
LARGEST_FILE = 100_000  # characters of one attached file that gptme sends


class Entry(NamedTuple):
    """One message of a log, with what decides how it is sent. (A tuple, for there are very many.)"""

    role: Role
    content: str
    timestamp: str = ""
    call_id: str | None = None
    pinned: bool = False
    ui_only: bool = False
    files: tuple[str, ...] = ()
    file_hashes: Mapping[str, str] = NO_HASHES
    model: str | None = None
    generation: str | None = None  # of the system prompt, where it was replaced during the conversation
    not_reproduced: tuple[str, ...] = ()  # what makes gptme send it otherwise than it stands here


def entry_of(row: Mapping[str, Any], halves: bool = True) -> Entry:
    """One message as the log has it. `halves`: whether half characters may stand in its content, which UTF-8 cannot hold.

    Raises:
        ValueError: with the reason, where gptme's own reader would pass the row over, or the role is unknown.
    """
    if row.get("role") not in ROLES:
        raise ValueError(f"role {row.get('role')!r:.40} is not one of {', '.join(ROLES)}")
    if not isinstance(row.get("content"), str):
        raise ValueError("content is not a string")
    if row.keys() <= PLAIN:
        content = printable(row["content"]) if halves else row["content"]
        return Entry(cast(Role, row["role"]), content, str(row.get("timestamp") or ""), pinned=bool(row.get("pinned")))
    files, hashes, metadata = row.get("files") or [], row.get("file_hashes") or {}, row.get("metadata") or {}
    if not isinstance(files, list) or not isinstance(hashes, dict) or not isinstance(metadata, dict):
        raise ValueError("files is not a list, or file_hashes or metadata is not an object")
    model, generation, call_id = metadata.get("model"), metadata.get("prompt_generation"), row.get("call_id")
    special = (("call_id", call_id), ("ephemeral_ttl", row.get("ephemeral_ttl")), ("resume_key", metadata.get("resume_key")))
    return Entry(
        role=cast(Role, row["role"]),
        content=printable(row["content"]) if halves else row["content"],
        timestamp=str(row.get("timestamp") or ""),
        call_id=printable(call_id) if isinstance(call_id, str) else None,
        pinned=bool(row.get("pinned")),
        ui_only=bool(row.get("ui_only")),
        files=tuple(map(str, files)),
        file_hashes={str(file): str(digest) for file, digest in hashes.items()} if hashes else NO_HASHES,
        model=printable(model) if isinstance(model, str) else None,
        generation=generation if isinstance(generation, str) else None,
        not_reproduced=tuple(name for name, value in special if value is not None),
    )


def read_entries(path: Path) -> tuple[list[Entry], list[Item]]:
    """The messages of one file, and the lines of it that are none.

    Raises:
        OSError: the file cannot be read, or is no conversation for its size.
    """
    entries: list[Entry] = []
    bad_lines: list[Item] = []
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_LOG:
            raise OSError(0, f"larger than {LARGEST_LOG // 2**20} MB", str(path))
        for line in lines_at_once(file) if size <= LONGEST_LINE else lines_of(file):
            try:
                row = json_object(line)
                if row is not None:
                    halves = line.raw is not None and (b"\\ud" in line.raw or b"\\uD" in line.raw)  # of a character, maybe
                    entries.append(entry_of(row, halves))
            except ValueError as error:
                bad_lines.append(BadLine(path, line.number, str(error)))
    return entries, bad_lines


def as_sent(entries: Sequence[Entry], folder: Path | None, workspace: str) -> list[Entry]:
    """What a server received at the last turn. `folder`: that of the log, where it keeps copies of attached files."""
    merged = _merge(_newest_prompt([entry for entry in entries if not entry.ui_only]))
    return [_inline_files(entry, folder, workspace) for entry in merged]


def _newest_prompt(entries: list[Entry]) -> list[Entry]:
    """Where tools or model were changed on the way, the newest prompt stands in front and the others are gone."""
    newest = next((entry.generation for entry in reversed(entries) if entry.generation), None)
    if newest is None:
        return entries
    startup = next((i for i, e in enumerate(entries) if e.role != "system" or not e.pinned or e.generation), len(entries))
    history = [entry for entry in entries[startup:] if not entry.generation]
    first = next(i for i, entry in enumerate(entries) if entry.generation == newest)
    earlier_turns = any(entry.role == "assistant" for entry in entries[:first])
    note = ("prompt_generation",) if earlier_turns else ()  # those were sent after another prompt
    prompt = [e._replace(not_reproduced=e.not_reproduced + note) for e in entries if e.generation == newest]
    return prompt + history


def _merge(entries: Sequence[Entry]) -> list[Entry]:
    """Neighbours of one role become one message, as gptme sends them; tool results and the boundary stay alone."""
    merged: list[Entry] = []
    for entry in entries:
        if merged and _mergeable(merged[-1], entry):
            before = merged.pop()
            entry = before._replace(
                content=f"{before.content}\n\n{entry.content}",
                files=before.files + entry.files,
                file_hashes={**before.file_hashes, **entry.file_hashes},
                not_reproduced=before.not_reproduced + entry.not_reproduced,
            )
        merged.append(entry)
    return merged


def _mergeable(before: Entry, after: Entry) -> bool:
    alone = any(entry.call_id or entry.content.startswith(CACHE_BOUNDARY) for entry in (before, after))
    return before.role == after.role and before.generation == after.generation and not alone


def _inline_files(entry: Entry, folder: Path | None, workspace: str) -> Entry:
    """The text files attached to a message, from the copies beside the log, behind its own text."""
    if not entry.files:
        return entry
    blocks: dict[str, str] = {}
    missing: list[str] = []
    for file in entry.files:
        text = _stored_text(folder, entry.file_hashes.get(file, ""), Path(file).suffix)
        if text is None:
            missing.append(printable(f"attachment {file}"))
        else:
            shown = printable(_shown_path(file, workspace))
            blocks[shown] = f"````{shown}\n{text}\n````"
    content = "\n\n".join([entry.content, *blocks.values()])
    return entry._replace(content=content, not_reproduced=(*entry.not_reproduced, *missing))


def _stored_text(folder: Path | None, digest: str, suffix: str) -> str | None:
    """None for an image, for a file of which no copy was kept and for whatever else is not text."""
    if folder is None or not digest.isalnum() or suffix.lower() == ".pdf" or (folder / "files").is_symlink():
        return None
    try:
        with open_regular(folder / "files" / f"{digest}{suffix}") as file:
            raw = file.read(4 * LARGEST_FILE + 4)
            size = file.seek(0, 2)
        text = codecs.getincrementaldecoder("utf-8")().decode(raw, final=size == len(raw))
    except (OSError, ValueError):  # ValueError: not UTF-8, or a NUL in the name
        return None
    if len(text) <= LARGEST_FILE and size == len(raw):
        return text
    if "\0" in text:
        return None
    note = f"\n\n[Content truncated to {LARGEST_FILE:,} characters (file is {size:,} bytes)]"
    return text[: LARGEST_FILE - len(note)] + note


def _shown_path(file: str, workspace: str) -> str:
    """Relative to the workspace where it lies in it, else as it is.

    The workspace is stored as "~/...": the home is that of the machine which wrote the log, so its shape is matched.
    """
    at_home = re.sub(r"^(/home/[^/]+|/Users/[^/]+|/root)/", "~/", file) if workspace.startswith("~") else file
    inside = at_home.removeprefix(workspace.rstrip("/") + "/")
    return inside if workspace and inside != at_home else file
