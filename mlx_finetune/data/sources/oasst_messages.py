"""The messages in a row of OpenAssistant's, in each of its layouts, told apart by shape.

Source: README and schemas.py of oasst-data in LAION-AI/Open-Assistant, and the cards of OpenAssistant/oasst1 and oasst2.
Exports may leave out keys whose value is null, so an absent key means null.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mlx_finetune.data.conversation import Role
from mlx_finetune.data.sources import printable

ROLES: dict[Any, Role] = {"prompter": "user", "assistant": "assistant"}
DEEPEST = 100  # replies to replies; the same everywhere, where Python's own limit differs between versions


@dataclass(frozen=True, slots=True)
class Post:
    """One message. `tree` and `state` are None where the file does not say; a review that is absent was never passed."""

    id: str
    parent: str | None
    tree: str | None
    state: str | None
    role: Role
    text: str
    lang: str
    rank: float | None  # 0 is the best
    reviewed: bool
    deleted: bool
    synthetic: bool
    created: str
    labels: dict[str, float]  # 0 to 1, the mean of the raters


@dataclass(frozen=True)
class Posts:
    """The messages of one row. `whole`: they are a tree, so no other row has a part of it. `thread`: others may repeat them."""

    posts: tuple[Post, ...]
    whole: bool = False
    thread: bool = False


def posts_of(row: dict[str, Any]) -> Posts:
    """A tree (`prompt`), a thread (`thread`), a first message with its `replies`, or one message.

    Raises:
        ValueError: with the reason why the row is none of these, the same for all rows that have the same fault.
    """
    if isinstance(row.get("thread"), list):
        return Posts(tuple(_thread(row["thread"])), thread=True)
    if "message_id" in row:
        whole = isinstance(row.get("replies"), list) and row.get("parent_id") is None
        tree = _text(row, "message_tree_id") or (_text(row, "message_id") if whole else None)
        return Posts(tuple(_nested(row, _text(row, "parent_id"), tree, _text(row, "tree_state"))), whole)
    if isinstance(row.get("prompt"), dict):
        tree = _text(row, "message_tree_id") or _text(row["prompt"], "message_id")
        return Posts(tuple(_nested(row["prompt"], None, tree, _text(row, "tree_state"))), whole=True)
    if "message_tree_id" in row:
        raise ValueError("a tree without its first message")
    raise ValueError("neither a message nor a tree of OpenAssistant's")


def _thread(thread: list[Any]) -> Iterator[Post]:
    """One message answers the one before it; the first one's id is the tree's, unless it says another."""
    parent = tree = None
    for index, message in enumerate(thread):
        _object(message)
        tree = tree or _text(message, "message_tree_id") or _text(message, "message_id")
        post = _post(message, parent if index else _text(message, "parent_id"), tree, _text(message, "tree_state"))
        yield post
        parent = post.id


def _nested(root: dict[str, Any], parent: str | None, tree: str | None, state: str | None) -> Iterator[Post]:
    """A message and all replies below it, each before its own replies. Within a tree the file leaves their tree_id null."""
    waiting: list[tuple[Any, str | None, int]] = [(root, parent, 0)]
    seen: set[str] = set()
    while waiting:
        node, parent, depth = waiting.pop()
        post = _post(_object(node), parent, tree, state)
        if post.id in seen:
            raise ValueError("two messages of one id in a tree")
        if depth > DEEPEST:
            raise ValueError("nested too deeply")
        seen.add(post.id)
        yield post
        replies = node.get("replies")
        if not isinstance(replies, list | None):
            raise ValueError("a message whose replies are not a list")
        waiting += [(reply, post.id, depth + 1) for reply in reversed(replies or [])]


def _post(row: dict[str, Any], parent: str | None, tree: str | None, state: str | None) -> Post:
    identity, text, role, created = _text(row, "message_id"), row.get("text"), row.get("role"), row.get("created_date")
    if not identity:
        raise ValueError("a message without an id")
    if not isinstance(text, str):
        raise ValueError("a message without text")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError("a role that is neither prompter nor assistant")
    return Post(
        id=identity,
        parent=parent,
        tree=tree,
        state=state,
        role=ROLES[role],
        text=printable(text),
        lang=_text(row, "lang") or "",
        rank=_number(row, "rank"),
        reviewed=_flag(row, "review_result"),
        deleted=_flag(row, "deleted"),
        synthetic=_flag(row, "synthetic"),
        created=printable(str(created)) if isinstance(created, str | datetime) else "",  # parquet may hold a time
        labels=_labels(row.get("labels")),
    )


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("a message that is not an object")
    return value


def _text(row: dict[str, Any], key: str) -> str | None:
    value = row.get(key)
    if value is None or _is_nan(value):
        return None
    if not isinstance(value, str):
        raise ValueError(f"{key} is not text")
    return printable(value) or None


def _flag(row: dict[str, Any], key: str) -> bool:
    """Null is no. Tables that were once in pandas have 1.0 and 0.0 and NaN."""
    value = row.get(key)
    if value is None or _is_nan(value):
        return False
    if not isinstance(value, int | float) or value not in (0, 1):
        raise ValueError(f"{key} is neither true nor false")
    return bool(value)


def _number(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    if value is None or _is_nan(value):
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{key} is not a number")
    return value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _labels(labels: Any) -> dict[str, float]:
    """Their values by name; one that is no number from 0 to 1 counts as not given.

    The Hub has lists of names and values, the exports an object by name; older parquet has one object a label.
    """
    pairs: list[tuple[Any, Any]]
    if labels is None:
        return {}
    if isinstance(labels, list) and all(isinstance(label, dict) for label in labels):
        pairs = [(label.get("name"), label.get("value")) for label in labels]
    elif not isinstance(labels, dict):
        raise ValueError("labels are neither an object nor lists of names and values")
    elif isinstance(labels.get("name"), list) and isinstance(labels.get("value"), list):
        pairs = list(zip(labels["name"], labels["value"], strict=False))
    else:
        pairs = [(name, label.get("value") if isinstance(label, dict) else label) for name, label in labels.items()]
    return {name: value for name, value in pairs if isinstance(name, str) and isinstance(value, int | float) and 0 <= value <= 1}
