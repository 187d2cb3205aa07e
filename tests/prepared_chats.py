"""Chats prepared as `prepare` does it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chats import chat

from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Conversation, write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate


def prepared(folder: Path, conversations: Sequence[Conversation], template: ChatTemplate, **settings: Any) -> Dataset:
    folder.mkdir(parents=True, exist_ok=True)
    write_conversations(folder / "all.jsonl", conversations)
    prepare([folder / "all.jsonl"], template, make_config(settings, "test"), folder / "dataset", {"model": "tiny"})
    return Dataset.open(folder / "dataset")


def of_times(count: int, source: str = "gptme") -> list[Conversation]:
    """One conversation a day, each in a group of its own."""
    return [
        Conversation(
            tuple(chat(f"{source} {i}", f"answer {i}")),
            source,
            f"{source}-{i}",
            "private",
            {"time": f"2026-01-{i + 1:02}T00:00:00+00:00"},
        )
        for i in range(count)
    ]
