"""What gptme says of a conversation in its config.toml. Source: gptme 0.35.1, config/chat.py."""

import os
import re
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlx_finetune.data.sources import BadLine, Item
from mlx_finetune.data.sources.log_files import open_regular

LARGEST_CONFIG = 2**20
TABLE = re.compile(r"\[[\w.-]+\]")  # the head of a table in a config


def chat_config(path: Path) -> tuple[dict[str, Any], list[Item]]:
    """config.toml's [chat]; a log need not have one, and a broken one costs only what it says."""
    try:
        with open_regular(path) as file:
            text = file.read(min(os.fstat(file.fileno()).st_size, LARGEST_CONFIG)).decode()
        chat = _chat_lines(text)
        if chat is None:
            chat = tomllib.loads(text).get("chat")
    except FileNotFoundError:
        return {}, []
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        return {}, [BadLine(path, 0, f"not TOML: {error}")]
    except OSError as error:
        return {}, [BadLine(path, 0, f"cannot be read: {error.strerror}")]
    return (chat if isinstance(chat, dict) else {}), []


def _chat_lines(text: str) -> dict[str, Any] | None:
    """[chat] where each of its lines is TOML of its own, as gptme writes it; else None. Most lines stand in every config."""
    table = ""
    chat: dict[str, Any] = {}
    for line in text.splitlines():
        if line.startswith("["):
            if not TABLE.fullmatch(line):
                return None
            table = line
        elif table in ("", "[chat]") and line:
            value = _toml_line(line) if table else None
            if value is None:
                return None
            chat |= value
    return chat


@lru_cache(maxsize=4096)
def _toml_line(line: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(line)
    except tomllib.TOMLDecodeError:
        return None
