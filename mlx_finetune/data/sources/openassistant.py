"""OpenAssistant trees (`*.trees.jsonl`, `.gz`): the best path of each tree becomes one conversation.

Source: the README of LAION-AI/Open-Assistant's oasst-data, and the cards of OpenAssistant/oasst1 and oasst2. Exports
may leave out keys whose value is null, so an absent key means null.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlx_finetune.data.conversation import Conversation, Message, Role
from mlx_finetune.data.sources import Read, Rejected, printable
from mlx_finetune.errors import UserError

SOURCE = "openassistant"
ROLES: dict[str, Role] = {"prompter": "user", "assistant": "assistant"}
TREES_HINT = "pass a trees file of the release, such as 2023-04-12_oasst_ready.trees.jsonl.gz"
Node = dict[str, Any]


def read(path: Path) -> Read:
    """One conversation a tree, the others in `rejected`; one tree, or one bare root message with replies, a line.

    Raises:
        UserError: with file, line and remedy, where the file is not such a file.
    """
    conversations: list[Conversation] = []
    rejected: list[Rejected] = []
    blank_lines = 0
    with _text_lines(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                blank_lines += 1
                continue
            tree = _tree(line, f"{path}:{number}")
            result = _best_conversation(tree)
            if isinstance(result, Conversation):
                conversations.append(result)
            else:
                rejected.append(result)
    if not conversations and not rejected:
        raise UserError(f"{path}: no tree in it", hint=TREES_HINT)
    return Read(tuple(conversations), tuple(rejected), (), blank_lines)


@contextmanager
def _text_lines(path: Path) -> Iterator[IO[str]]:
    """The open file, unpacked where it is gzip whatever its name; every failure to read it becomes a UserError."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8") as lines:
            yield lines
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: broken gzip file: {error}", hint="download it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason}", hint=TREES_HINT) from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}", hint=TREES_HINT) from error


@dataclass(frozen=True)
class _Tree:
    id: str
    state: str | None
    root: Node


def _tree(line: str, place: str) -> _Tree:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}", hint=TREES_HINT) from error
    root = _root(row, place)
    _check(root, place)
    return _Tree(printable(str(row.get("message_tree_id") or root["message_id"])), row.get("tree_state"), root)


def _root(row: Any, place: str) -> Node:
    """The first message of a tree, with or without its wrapper; any other layout is refused by its name."""
    if not isinstance(row, dict):
        raise UserError(f"{place}: not an OpenAssistant tree, but {type(row).__name__}", hint=TREES_HINT)
    if isinstance(row.get("prompt"), dict):
        return row["prompt"]
    if "replies" in row:
        return row
    if "message_id" in row:
        raise UserError(f"{place}: flat messages (one message a line), not trees", hint=TREES_HINT)
    found = "threads" if "thread" in row else "keys " + ", ".join(map(repr, list(row)[:5]))
    raise UserError(f"{place}: not an OpenAssistant tree: {found}", hint=TREES_HINT)


def _check(root: Node, place: str) -> None:
    """Every node of the tree has an id, a text and a known role, also those that no path will use."""
    nodes = [root]
    while nodes:
        node = nodes.pop()
        name = node.get("message_id") if isinstance(node, dict) else None
        if not isinstance(name, str) or not isinstance(node.get("text"), str):
            raise UserError(f"{place}: message {name!r} has no message_id or no text", hint=TREES_HINT)
        if not isinstance(node.get("role"), str) or node["role"] not in ROLES:
            known = ", ".join(ROLES)
            raise UserError(f"{place}: message {name}: role {node.get('role')!r:.40} is not one of {known}", hint=TREES_HINT)
        if not isinstance(node.get("replies") or [], list) or not isinstance(node.get("rank") or 0, int):
            raise UserError(f"{place}: message {name}: replies is not a list or rank not a number", hint=TREES_HINT)
        nodes.extend(_replies(node))


def _best_conversation(tree: _Tree) -> Conversation | Rejected:
    if tree.state not in (None, "ready_for_export"):
        return Rejected(tree.id, SOURCE, f"tree is {tree.state}, not ready_for_export")
    if fault := _fault(tree.root):
        return Rejected(tree.id, SOURCE, f"first message {fault}")
    path = _best_path(tree.root)
    if not path:
        return Rejected(tree.id, SOURCE, "no reply that is reviewed, not deleted and not synthetic")
    return Conversation(
        messages=tuple(Message(ROLES[node["role"]], printable(node["text"])) for node in path),
        source=SOURCE,
        group=tree.id,
        license="Apache-2.0",
        meta={"lang": printable(str(tree.root.get("lang"))), "message_ids": [printable(str(node["message_id"])) for node in path]},
    )


def _best_path(root: Node) -> list[Node]:
    """From the root the best reply at each step, up to the last assistant message; empty where nobody replied."""
    path = [root]
    while replies := [reply for reply in _replies(path[-1]) if not _fault(reply)]:
        path.append(min(replies, key=_rank))
    while path and path[-1]["role"] == "prompter":
        path.pop()
    return path


def _rank(node: Node) -> float:
    """0 is the best; an unranked reply counts only where none is ranked, and then the first does."""
    return float("inf") if node.get("rank") is None else node["rank"]


def _replies(node: Node) -> list[Node]:
    return node.get("replies") or []


def _fault(node: Node) -> str | None:
    """Why a message, and all that answers it, is left out. A review that is absent was never passed."""
    if node.get("deleted"):
        return "is deleted"
    if node.get("synthetic"):
        return "is synthetic"
    return None if node.get("review_result") is True else "did not pass review"
