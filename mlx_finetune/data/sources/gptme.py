"""gptme's own logs: `<folder>/<name>/conversation.jsonl`, read as gptme would send them to a server.

Source: gptme 0.35.1, logmanager/manager.py (`_gen_read_jsonl`, `_merge_consecutive_messages`, `prepare_messages`),
util/context.py (`embed_attached_file_content`) and dirs.py (`get_logs_dir`).
"""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from mlx_finetune.data.conversation import Conversation, Message, Role
from mlx_finetune.data.sources import BadLine, Read, Rejected, printable
from mlx_finetune.errors import UserError

SOURCE = "gptme"
ROLES = ("system", "user", "assistant")
CACHE_BOUNDARY = "# System Prompt Cache Boundary\n"  # the message with this heading is never merged
LARGEST_FILE = 100_000  # characters of one attached file that gptme sends
FOLDER_HINT = "pass the folder that holds gptme's conversations, or set GPTME_LOGS_HOME to it"


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


def read(folder: Path) -> Read:
    """Every `*/conversation.jsonl` of a logs folder, in order of name; branches, events and views are left alone.

    A line that cannot be read is named in `bad_lines`, a log that cannot be opened in `rejected`: neither is fatal.
    The messages before each assistant turn are those that gptme sent, but for what meta["not_reproduced"] names:
    native tool calls (call_id), replaced prompts (prompt_generation, resume_key), messages that expire
    (ephemeral_ttl), and attachments of which the log keeps no text.

    Raises:
        UserError: there is no such folder, or no conversation lies in it.
    """
    logs = _logs(folder)
    conversations: list[Conversation] = []
    rejected: list[Rejected] = []
    bad_lines: list[BadLine] = []
    blank_lines = 0
    for path in logs:
        try:
            log = _read_log(path)
        except OSError as error:
            rejected.append(Rejected(printable(path.parent.name), SOURCE, f"cannot be read: {error.strerror}"))
            continue
        conversations.extend(log.conversations)
        bad_lines.extend(log.bad_lines)
        blank_lines += log.blank_lines
    return Read(tuple(conversations), tuple(rejected), tuple(bad_lines), blank_lines)


def _logs(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder", hint=FOLDER_HINT)
    logs = sorted(folder.glob("*/conversation.jsonl"))
    if not logs and (folder / "conversation.jsonl").exists():
        raise UserError(f"{folder} is one conversation, not a logs folder", hint=f"pass {folder.absolute().parent}")
    if not logs:
        raise UserError(f"{folder}: no */conversation.jsonl in it", hint=FOLDER_HINT)
    return logs


@dataclass(frozen=True)
class _Entry:
    """One message of a log, with what decides how it is sent."""

    role: Role
    content: str
    call_id: str | None = None
    ui_only: bool = False
    files: tuple[str, ...] = ()
    file_hashes: dict[str, str] = field(default_factory=dict)
    model: str | None = None
    not_reproduced: tuple[str, ...] = ()  # what makes gptme send it otherwise than it stands here


def _read_log(path: Path) -> Read:
    entries: list[_Entry] = []
    bad_lines: list[BadLine] = []
    blank_lines = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                blank_lines += 1
                continue
            try:
                entries.append(_entry(line))
            except ValueError as error:
                bad_lines.append(BadLine(path, number, str(error)))
    chat, bad_config = _chat_config(path.parent / "config.toml")
    return Read((_conversation(path.parent, entries, chat),), (), (*bad_lines, *bad_config), blank_lines)


def _entry(line: str) -> _Entry:
    """Raises ValueError with the reason where gptme's own reader would pass the line over, or the role is unknown."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"not JSON, or cut off: {error.msg.removesuffix(' at')}, column {error.colno}"
        raise ValueError(reason) from error
    except RecursionError as error:
        raise ValueError("not a message: nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError("not a message: a JSON object is expected")
    if row.get("role") not in ROLES:
        raise ValueError(f"role {row.get('role')!r:.40} is not one of {', '.join(ROLES)}")
    if not isinstance(row.get("content"), str):
        raise ValueError("content is not a string")
    files, hashes, metadata = row.get("files") or [], row.get("file_hashes") or {}, row.get("metadata") or {}
    if not isinstance(files, list) or not isinstance(hashes, dict) or not isinstance(metadata, dict):
        raise ValueError("files is not a list, or file_hashes or metadata is not an object")
    special = {key: row.get(key) for key in ("call_id", "ephemeral_ttl")}
    special |= {key: metadata.get(key) for key in ("prompt_generation", "resume_key")}
    return _Entry(
        role=cast(Role, row["role"]),
        content=printable(row["content"]),
        call_id=row.get("call_id"),
        ui_only=bool(row.get("ui_only")),
        files=tuple(str(file) for file in files),
        file_hashes={str(file): str(digest) for file, digest in hashes.items()},
        model=printable(metadata["model"]) if isinstance(metadata.get("model"), str) else None,
        not_reproduced=tuple(name for name, value in special.items() if value is not None),
    )


def _chat_config(path: Path) -> tuple[dict[str, Any], list[BadLine]]:
    """The strings of config.toml's [chat]; a log need not have one, and a broken one costs only these names."""
    try:
        chat = tomllib.loads(path.read_text(encoding="utf-8")).get("chat")
    except FileNotFoundError:
        return {}, []
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return {}, [BadLine(path, 0, f"not TOML: {error}")]
    except OSError as error:
        return {}, [BadLine(path, 0, f"cannot be read: {error.strerror}")]
    chat = chat if isinstance(chat, dict) else {}
    return {key: value for key, value in chat.items() if isinstance(value, str) and value}, []


def _conversation(folder: Path, entries: Sequence[_Entry], chat: Mapping[str, str]) -> Conversation:
    merged = _merge([entry for entry in entries if not entry.ui_only])
    sent = [_inline_files(entry, folder, chat.get("workspace", "")) for entry in merged]
    model = chat.get("model") or next((entry.model for entry in entries if entry.model), None)
    meta = {
        "name": printable(folder.name),
        "title": chat.get("name"),
        "tool_format": chat.get("tool_format"),
        "model": model,
        "not_reproduced": sorted({name for entry in sent for name in entry.not_reproduced}),
    }
    return Conversation(
        messages=tuple(Message(entry.role, entry.content) for entry in sent),
        source=SOURCE,
        group=printable(folder.name),
        license="private",
        meta={key: value for key, value in meta.items() if value},
    )


def _merge(entries: Sequence[_Entry]) -> list[_Entry]:
    """Neighbours of one role become one message, as gptme sends them; tool results and the boundary stay alone."""
    merged: list[_Entry] = []
    for entry in entries:
        if merged and _mergeable(merged[-1], entry):
            before = merged.pop()
            entry = replace(
                before,
                content=f"{before.content}\n\n{entry.content}",
                files=before.files + entry.files,
                file_hashes=before.file_hashes | entry.file_hashes,
                not_reproduced=before.not_reproduced + entry.not_reproduced,
            )
        merged.append(entry)
    return merged


def _mergeable(before: _Entry, after: _Entry) -> bool:
    alone = any(entry.call_id or entry.content.startswith(CACHE_BOUNDARY) for entry in (before, after))
    return before.role == after.role and not alone


def _inline_files(entry: _Entry, folder: Path, workspace: str) -> _Entry:
    """The text files attached to a message, from the copies beside the log, behind its own text."""
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
    return replace(entry, content=content, not_reproduced=(*entry.not_reproduced, *missing))


def _stored_text(folder: Path, digest: str, suffix: str) -> str | None:
    """None for an image, for a file of which no copy was kept and for whatever else is not text."""
    path = folder / "files" / f"{digest}{suffix}"
    if not digest.isalnum() or suffix.lower() == ".pdf" or not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST_FILE + 1)
    except UnicodeDecodeError:
        return None
    if len(text) <= LARGEST_FILE:
        return text
    if "\0" in text:
        return None
    note = f"\n\n[Content truncated to {LARGEST_FILE:,} characters (file is {path.stat().st_size:,} bytes)]"
    return text[: LARGEST_FILE - len(note)] + note


def _shown_path(file: str, workspace: str) -> str:
    """Relative to the workspace where it lies in it, else as it is.

    The workspace is stored as "~/...": the home is that of the machine which wrote the log, so its shape is matched.
    """
    at_home = re.sub(r"^(/home/[^/]+|/Users/[^/]+|/root)/", "~/", file) if workspace.startswith("~") else file
    inside = at_home.removeprefix(workspace.rstrip("/") + "/")
    return inside if workspace and inside != at_home else file
