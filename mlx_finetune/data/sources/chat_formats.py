"""Chat files of other programs: each row becomes a conversation, or is named with the field that is wrong in it.

Which formats are known and by what they are recognised stands in chat_shapes.py, in what they may be packed in chat_files.py
and chat_tables.py.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from mlx_finetune.data.conversation import Conversation
from mlx_finetune.data.sources import BadLine, Item, Rejected, printable
from mlx_finetune.data.sources.chat_files import HINT, Row, is_parquet, rows_of
from mlx_finetune.data.sources.chat_messages import messages_of, role_of
from mlx_finetune.data.sources.chat_shapes import KNOWN, Foreign, Shape, shape_of
from mlx_finetune.data.sources.chat_tables import HUB_ID, hub_rows, parquet_rows, saved_rows
from mlx_finetune.data.sources.chat_values import CannotLearn, RowError, listed, named, object_of, shown, tidy
from mlx_finetune.errors import UserError

SOURCE = "chat"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".txt")
UNWANTED = {"label": False, "kto_tag": False, "judgement": "FAIL"}  # how files mark an answer that is not to be learned
TIMES = ("time", "timestamp", "created_at", "created")


T = TypeVar("T")
OfRows = Callable[[Iterator[Row], Path, str], Iterator[T]]


class _Said(UserError):
    """Why nothing of a file is read, which its bad lines have said already."""


def read(source: str | Path) -> Iterator[Item]:
    """What a chat file gives, row by row; of a folder every chat file in it; of a Hugging Face dataset's id its rows.

    A row that cannot be read is a BadLine, one from which nothing can be learned Rejected; both name the field. Rows of a test
    split are Rejected whatever their format: `split` is "TEST" (OpenPipe) or "test", in the row or in its metadata.

    Raises:
        UserError: there is no such file, it cannot be read or is broken, or no row of it has a shape that is known.
    """
    return walk(source, _items)


def walk(source: str | Path, of: OfRows[T]) -> Iterator[T | BadLine]:
    """What `of` gives of the rows of each file, its path and its name; a file of a folder that cannot be read is a BadLine.

    Raises:
        UserError: as `read`.
    """
    name, path = str(source), Path(source)
    if os.path.isdir(path):  # noqa: PTH112  Path's raises for what may not be looked at
        yield from _read_folder(path, of)
    elif os.path.lexists(path):
        yield from _read_file(path, path.name, of)
    elif HUB_ID.fullmatch(name) and not _is_chat_file(name):
        yield from of(hub_rows(name), path, name)
    else:
        shown_name = printable(name).replace("\0", "?")
        raise UserError(f"{shown_name}: no such file", hint=HINT)


def _is_chat_file(name: str) -> bool:
    return name.lower().removesuffix(".gz").endswith(SUFFIXES)


def _read_file(path: Path, name: str, of: OfRows[T]) -> Iterator[T]:
    return of(parquet_rows(path) if is_parquet(path) else rows_of(path), path, name)


def _read_folder(folder: Path, of: OfRows[T]) -> Iterator[T | BadLine]:
    """Links are not followed, hidden files and those of other kinds left alone; a file that is no chat file is one BadLine."""
    try:
        saved = {"state.json", "dataset_dict.json"} & set(os.listdir(folder))  # noqa: PTH208
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}", hint=HINT) from error
    if saved:
        yield from of(saved_rows(folder), folder, folder.name)
        return
    read_any, fault = False, UserError(f"{folder}: no chat file in it", hint=KNOWN)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or not _is_chat_file(path.name) or (path.is_dir() and not path.is_symlink()):
            continue
        try:
            if path.is_symlink():
                raise UserError(f"{path}: a link, not followed")
            yield from _read_file(path, name.as_posix(), of)
            read_any = True
        except UserError as error:
            fault = error if fault.hint == KNOWN else fault  # the one that says more
            if not isinstance(error, _Said):
                yield BadLine(path, 0, printable(error.message.removeprefix(f"{path}: ")))
    if not read_any:
        raise fault


def _items(rows: Iterator[Row], path: Path, name: str) -> Iterator[Item]:
    known = False
    first: UserError | None = None  # what to say where no row is known
    for row in rows:
        try:
            if row.fault:
                raise RowError(row.fault)
            shape = shape_of(row.value)
        except RowError as error:
            hint = error.hint if isinstance(error, Foreign) else ""
            fault = _Said(f"{path}:{row.line}: {error}", hint=hint or KNOWN)
            yield BadLine(path, row.line, f"{error}: {hint}" if hint else str(error))
            if hint and not known:
                raise fault from error
            first = first or fault
        else:
            known = True
            yield _item(row, shape, path, printable(f"{name}:{row.number}"))
    if not known:
        raise first or UserError(f"{path}: no row in it", hint=HINT)


def _item(row: Row, shape: Shape, path: Path, place: str) -> Item:
    value = row.value if isinstance(row.value, dict) else {}
    name = _own_name(value) or place
    try:
        return _conversation(value, shape, name)
    except CannotLearn as error:
        return Rejected(name, SOURCE, str(error), error.countable)
    except RowError as error:
        return BadLine(path, row.line, str(error))


def _conversation(row: Mapping[str, Any], shape: Shape, name: str) -> Conversation:
    _refuse_unwanted(row, shape)
    entries = shape.entries()
    if not entries:
        raise CannotLearn("no messages")
    for key in ("system", "system_prompt"):
        if row.get(key) not in (None, "", []) and role_of(entries[0][1]) != "system":
            entries = [(key, {"role": "system", "content": row[key]}), *entries]
    license_ = row.get("license")
    group = row["group"] if _is_ours(row) else row.get("conversation_id")
    return Conversation(
        messages=messages_of(entries),
        source=SOURCE,
        group=printable(group) if isinstance(group, str) and group else name,
        license=printable(license_) if isinstance(license_, str) and license_ else "unknown",
        meta=_meta(row, shape, name),
        tools=_tools(shape.about, shape.field),
    )


def _refuse_unwanted(row: Mapping[str, Any], shape: Shape) -> None:
    """Raises CannotLearn for an answer that is marked as a bad one, and for a row that is kept for tests."""
    for key, value in UNWANTED.items():
        if isinstance(row.get(key), type(value)) and row[key] == value:
            raise CannotLearn("the answer is marked as a bad one", key, json.dumps(value))
    for field, about in {"": row, shape.field: shape.about}.items():
        for place, one in ((field, about), *((f"{field}{key}.", object_of(about.get(key))) for key in ("metadata", "meta"))):
            split = one.get("split") if isinstance(one, Mapping) else None
            if isinstance(split, str) and split.strip().lower() == "test":
                raise CannotLearn("a test split, such as OpenPipe's, is never learned", f"{place}split", named(split))


def _is_ours(row: Mapping[str, Any]) -> bool:
    """Whether it is a line of a file that `collect` made."""
    return isinstance(row.get("meta"), dict) and isinstance(row.get("group"), str)


def _own_name(row: Mapping[str, Any]) -> str:
    ours = row["meta"].get("name") if _is_ours(row) else None
    names = (ours, row.get("id"), row.get("conversation_id"))
    return next((printable(name) for name in names if isinstance(name, str) and name.strip()), "")


def _meta(row: Mapping[str, Any], shape: Shape, name: str) -> dict[str, Any]:
    known = tidy(row["meta"], "meta") if _is_ours(row) else {}
    split = row.get("split")
    said = {key: one for key in ("title", "model") if isinstance(one := shape.about.get(key), str)}
    said["time"] = next((time for key in TIMES if (time := _time(shape.about.get(key)))), "")
    said["split"] = split if isinstance(split, str) and shape.format == "openpipe" else ""
    return known | {key: printable(one) for key, one in said.items() if one} | {"name": name, "format": shape.format}


def _time(value: Any) -> str:
    """ISO 8601 in UTC, of seconds or milliseconds since 1970 or of text; "" where it is no time."""
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        elif isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 10**14:
            moment = datetime.fromtimestamp(value / 1000 if value > 10**11 else value, UTC)
        else:
            return ""
    except (ValueError, OverflowError, OSError):
        return ""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _tools(about: Mapping[str, Any], field: str) -> tuple[dict[str, Any], ...]:
    """Function schemas as OpenAI's format has them today, from `tools` or the older `functions`."""
    key = next((key for key in ("tools", "functions") if about.get(key) not in (None, "", [])), None)
    if key is None or (isinstance(about[key], str) and not about[key].strip()):
        return ()
    field = f"{field}{key}"
    tools = []
    for i, tool in enumerate(listed(about[key], field)):
        if not isinstance(tool, dict):
            raise RowError(f"{field}[{i}]: {shown(tool)} is not an object")
        bare = "function" not in tool and "name" in tool
        function = {name: one for name, one in tool.items() if name != "type"}
        tools.append(tidy({"type": "function", "function": function} if bare else tool, f"{field}[{i}]"))
    return tuple(tools)
