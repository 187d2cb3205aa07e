"""Genuine files of every kind that is read as data: logs, chats, trees, tables, a collection, a prepared folder."""

import gzip
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.data.conversation import Conversation, conversation_of_line
from mlx_finetune.data.dataset import write_dataset
from mlx_finetune.data.examples import Example

CHATS: Mapping[str, Any] = {
    "openai": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "w", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "rain", "tool_call_id": "c"},
            {"role": "assistant", "content": "Rain.", "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}],
        "created": 1700000000,
    },
    "openpipe": {
        "input": {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
        "output": {"choices": [{"message": {"role": "assistant", "content": "Hello"}}]},
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be brief."},
    "alpaca": {"instruction": "Add.", "input": "1 1", "output": "2", "history": [["a", "b"]]},
    "prompt": {"prompt": "Hi", "completion": "Hello", "label": True},
    "preference": {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Hello"}],
        "rejected": [],
    },
    "text": {"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"},
}
LOG = [
    {"role": "system", "content": "You are gptme.", "timestamp": "2026-06-03T08:44:37", "pinned": True},
    {
        "role": "user",
        "content": "List.",
        "timestamp": "2026-06-03T08:44:38",
        "files": ["/home/x/a.txt"],
        "file_hashes": {"/home/x/a.txt": "ab12"},
    },
    {
        "role": "assistant",
        "content": "```shell\nls\n```",
        "timestamp": "2026-06-03T08:44:39+02:00",
        "metadata": {"model": "m", "prompt_generation": "g"},
    },
    {"role": "system", "content": "a.txt", "timestamp": "2026-06-03T08:44:40", "call_id": "c"},
    {"role": "assistant", "content": "One file.", "timestamp": "2026-06-03T08:44:41"},
]
TOML = (
    'workspace = "~/x"\n\n[chat]\nname = "List"\nmodel = "m"\ntool_format = "markdown"\ntools = ["shell"]\ninteractive = true\n\n'
    "[env]\nA = 1\n"
)


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_logs(folder: Path) -> None:
    log = folder / "logs" / "2026-06-03-list"
    (log / "branches").mkdir(parents=True)
    (log / "files").mkdir()
    (log / "files" / "ab12.txt").write_text("text of a file")
    write_lines(log / "conversation.jsonl", LOG)
    write_lines(log / "branches" / "main-undo-1.jsonl", LOG[:3])
    write_lines(log / "branches" / "other.jsonl", [*LOG[:2], LOG[4] | {"content": "Another."}])
    (log / "config.toml").write_text(TOML)


def write_compacted(folder: Path) -> None:
    write_logs(folder)
    write_lines(folder / "logs/2026-06-03-list/lossless.jsonl", LOG)


def write_trees(folder: Path) -> None:
    from oasst_rows import node, tree

    rows = [tree(node("p1", node("a1", node("p2", node("a2", rank=1.0))), node("a3", rank=0, labels={"spam": {"value": 0.1}})))]
    write_lines(folder / "oasst.jsonl", rows)


def write_flat(folder: Path) -> None:
    from oasst_rows import flat

    rows = [
        flat("p1", created_date="2023-02-05T14:23:50.983374+00:00"),
        flat("a1", "p1", labels={"name": ["spam"], "value": [0.0]}),
        flat("p2", "a1"),
        flat("a2", "p2"),
    ]
    write_lines(folder / "oasst.jsonl", rows)


def write_threads(folder: Path) -> None:
    from oasst_rows import node

    thread = [{key: value for key, value in node(name).items() if key != "replies"} for name in ("p1", "a1")]
    write_lines(folder / "oasst.jsonl", [{"thread_id": "t", "thread": thread}])


def packed(write: Callable[[Path], None], name: str) -> Callable[[Path], None]:
    def written(folder: Path) -> None:
        write(folder)
        (folder / name).write_bytes(gzip.compress((folder / name).read_bytes(), mtime=0))

    return written


def table(rows: list[Any], name: str) -> Callable[[Path], None]:
    def written(folder: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)

    return written


def text_file(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")

    return write


def write_collected(folder: Path) -> None:
    conversations = [
        Conversation(
            conversation_of_line(
                json.dumps(
                    CHATS["openai"]
                    | {
                        "messages": [
                            {"role": "user", "content": "a"},
                            {"role": "assistant", "content": "b", "weight": 0.5, "reason": "why"},
                        ]
                    }
                ),
                "x",
            ).messages,
            "gptme",
            "g",
            "MIT",
            {"name": "n", "time": "2026-06-03T08:44:37Z"},
        )
    ]
    write_lines(folder / "gptme.jsonl", [one.to_json() for one in conversations] * 2)


def write_index(folder: Path) -> None:
    from gptme_logs import said, write_log

    from mlx_finetune.data.collect import collect
    from mlx_finetune.data.found import Sources
    from mlx_finetune.data.refine import Settings

    write_log(folder / "logs", "one", said("user", "Hi"), said("assistant", "Hello there, how are you?"))
    write_log(folder / "logs", "two", said("user", "Ho"), "{not JSON", said("assistant", "Hello."))
    collect(Sources(logs=folder / "logs"), Settings(near_duplicates=None), folder / "out")


def write_prepared(folder: Path) -> None:
    (folder / "data").mkdir()
    tokens, weights = np.arange(6, dtype=np.int32), np.array([0, 0, 1, 1, 1, 1], np.float32)
    examples = [Example(tokens, weights, "gptme", "c", (0,), 1, False, "f")] * 3
    (folder / "data" / "valid.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    counts = dict.fromkeys(("examples", "tokens", "learned_tokens", "learned_turns", "exact_turns", "served_as_trained"), 3)
    split = counts | {"conversations": {"gptme": 1}, "learned_tokens_by_source": {"gptme": 3}, "turns_refused": {"why": 1}}
    policy = {"name": "plain", "what": "x"}
    info = {"max_length": 64, "role_policy": policy, "train": split, "valid": split, "test": split}
    write_dataset(folder / "data", {"train": examples, "valid": examples[:1], "test": []}, lambda: info)
