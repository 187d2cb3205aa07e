"""Rows of OpenAssistant's layouts that tests make up, and what a reader gave of them."""

import json
from pathlib import Path
from typing import Any

from mlx_finetune.data.sources import Read, gather, openassistant
from mlx_finetune.data.sources.openassistant import EVERYTHING, Options


def paths_of(read: Read) -> list[list[str]]:
    return [conversation.meta["message_ids"] for conversation in read.conversations]


def read_all(path: str | Path, options: Options = EVERYTHING) -> Read:
    return gather(openassistant.read(path, options))


def node(name: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A reviewed message whose role follows from its name: p... is a prompter's, a... an assistant's."""
    role = "prompter" if name.startswith("p") else "assistant"
    base = {"message_id": name, "text": f"text of {name}", "role": role, "lang": "en", "review_result": True}
    return base | {"deleted": False, "synthetic": False, "replies": list(replies)} | more


def tree(root: dict[str, Any], state: str | None = "ready_for_export") -> dict[str, Any]:
    return {"message_tree_id": "tree-" + root["message_id"], "tree_state": state, "prompt": root}


def flat(name: str, parent: str | None = None, tree: str | None = "t", **more: Any) -> dict[str, Any]:
    row = node(name, **more) | {"parent_id": parent, "message_tree_id": tree, "tree_state": "ready_for_export"}
    return {key: value for key, value in row.items() if key != "replies"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


GOOD = tree(node("p1", node("a1")))
