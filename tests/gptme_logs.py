"""Small gptme logs written by the tests, and what was read of them."""

import json
from pathlib import Path

from mlx_finetune.data.sources import Read, gather, gptme


def write_log(folder: Path, name: str, *lines: dict | str) -> Path:
    """A logs folder with one more log; text is written as it stands, a dict as JSON."""
    log = folder / name / "conversation.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return log


def said(role: str, content: str, **more: object) -> dict:
    """A line of a log."""
    return {"role": role, "content": content, "timestamp": "2026-06-03T08:44:37"} | more


def read_all(folder: Path) -> Read:
    """Everything that a folder of logs holds."""
    return gather(gptme.read(folder))


def messages_of(read: Read) -> list[tuple[str, str]]:
    """Role and text of the messages of the only conversation."""
    (conversation,) = read.conversations
    return [(message.role, message.content) for message in conversation.messages]
