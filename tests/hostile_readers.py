"""Every reader of files that strangers or a crash may have written: a genuine folder, the file that is damaged, the call."""

import gzip
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import yaml

from mlx_finetune.config import RunConfig, load_config, make_config, parse_assignments
from mlx_finetune.data.collection import earlier_collection, read_index
from mlx_finetune.data.conversation import Conversation, conversation_of_line, read_conversations
from mlx_finetune.data.dataset import Dataset, write_dataset
from mlx_finetune.data.entries import entries, read_entry
from mlx_finetune.data.examples import Example
from mlx_finetune.data.sources import Item, chat_formats, gptme, openassistant
from mlx_finetune.data.sources.openassistant import EVERYTHING
from mlx_finetune.data.tags import read_tags
from mlx_finetune.errors import UserError

LONGEST = 500  # characters of a message, without the place
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
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Reader:
    """`write` makes a genuine folder, `target` is the file of it that is damaged, `read` reads the folder."""

    target: str
    write: Callable[[Path], None]
    read: Callable[[Path], object]
    slow: bool = False  # more than some milliseconds

    def check(self, folder: Path, data: bytes) -> str:
        """Reads with `data` in place of the file: "read", or why not; raises AssertionError for what is no line for a person."""
        (folder / self.target).write_bytes(data)
        try:
            self.read(folder)
        except UserError as error:
            return check_message(error, str(folder))
        return "read"


def check_message(error: UserError, place: str = "") -> str:
    """Its message, which is one short line, as is its hint."""
    assert error.message.strip(), "says nothing"
    for text in (error.message, error.hint):
        plain = text.replace(place, "") if place else text
        assert len(plain.splitlines()) <= 1 and (text is error.hint or len(plain) < LONGEST), plain[:2000]
        plain.encode()
    return error.message


def _lines(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def check_items(items: Iterable[Item]) -> None:
    """What a source gave can be written and is read back as it was."""
    for item in items:
        text = json.dumps(item.to_json(), ensure_ascii=False)
        text.encode()
        if isinstance(item, Conversation):
            assert conversation_of_line(text, "here:1").messages == item.messages
            assert item.group and item.id and item.name
        else:
            assert len(item.reason.splitlines()) <= 1 and len(item.reason) < LONGEST, item.reason


def _write_logs(folder: Path) -> None:
    log = folder / "logs" / "2026-06-03-list"
    (log / "branches").mkdir(parents=True)
    (log / "files").mkdir()
    (log / "files" / "ab12.txt").write_text("text of a file")
    _lines(log / "conversation.jsonl", LOG)
    _lines(log / "branches" / "main-undo-1.jsonl", LOG[:3])
    _lines(log / "branches" / "other.jsonl", [*LOG[:2], LOG[4] | {"content": "Another."}])
    (log / "config.toml").write_text(TOML)


def _write_compacted(folder: Path) -> None:
    _write_logs(folder)
    _lines(folder / "logs/2026-06-03-list/lossless.jsonl", LOG)


def _read_logs(folder: Path) -> None:
    check_items(gptme.read(folder / "logs"))


def _trees(folder: Path) -> None:
    from oasst_rows import node, tree

    rows = [tree(node("p1", node("a1", node("p2", node("a2", rank=1.0))), node("a3", rank=0, labels={"spam": {"value": 0.1}})))]
    _lines(folder / "oasst.jsonl", rows)


def _flat(folder: Path) -> None:
    from oasst_rows import flat

    rows = [
        flat("p1", created_date="2023-02-05T14:23:50.983374+00:00"),
        flat("a1", "p1", labels={"name": ["spam"], "value": [0.0]}),
        flat("p2", "a1"),
        flat("a2", "p2"),
    ]
    _lines(folder / "oasst.jsonl", rows)


def _threads(folder: Path) -> None:
    from oasst_rows import node

    thread = [{key: value for key, value in node(name).items() if key != "replies"} for name in ("p1", "a1")]
    _lines(folder / "oasst.jsonl", [{"thread_id": "t", "thread": thread}])


def _packed(write: Callable[[Path], None], name: str) -> Callable[[Path], None]:
    def packed(folder: Path) -> None:
        write(folder)
        (folder / name).write_bytes(gzip.compress((folder / name).read_bytes(), mtime=0))

    return packed


def _table(rows: list[Any], name: str) -> Callable[[Path], None]:
    def table(folder: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)

    return table


def _read_oasst(folder: Path) -> None:
    check_items(openassistant.read(folder / "oasst.jsonl", EVERYTHING))


def _chat(name: str) -> Reader:
    return Reader("chats.jsonl", lambda folder: _lines(folder / "chats.jsonl", [CHATS[name], CHATS[name]]), _read_chats)


def _read_chats(folder: Path) -> None:
    check_items(chat_formats.read(next(folder.glob("chats.*"))))


def _text(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")

    return write


def _collected(folder: Path) -> None:
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
    _lines(folder / "gptme.jsonl", [one.to_json() for one in conversations] * 2)


def _read_collected(folder: Path) -> None:
    path = folder / "gptme.jsonl"
    try:
        found = list(entries(path))
    except UserError as error:
        check_message(error, str(path))
    else:
        for entry in found:
            check_items([read_entry(entry)])
    check_items(read_conversations(path))


def _write_index(folder: Path) -> None:
    from gptme_logs import said, write_log

    from mlx_finetune.data.collect import collect
    from mlx_finetune.data.found import Sources
    from mlx_finetune.data.refine import Settings

    write_log(folder / "logs", "one", said("user", "Hi"), said("assistant", "Hello there, how are you?"))
    write_log(folder / "logs", "two", said("user", "Ho"), "{not JSON", said("assistant", "Hello."))
    collect(Sources(logs=folder / "logs"), Settings(near_duplicates=None), folder / "out")


def _read_earlier(folder: Path) -> None:
    asked = {"settings": {"selection": {"tags": {}}}, "sources": {"logs": str(folder / "logs"), "chats": [], "openassistant": []}}
    earlier_collection(folder / "out", asked)


def _read_config(folder: Path) -> None:
    config = load_config(folder / "config.yaml", {})
    assert RunConfig.model_validate(config.to_dict()) == config


def _read_assignment(folder: Path) -> None:
    text = (folder / "set.txt").read_bytes().decode("utf-8", errors="replace")
    make_config(parse_assignments([text]), "the command line")


def _dataset(folder: Path) -> None:
    (folder / "data").mkdir()
    tokens, weights = np.arange(6, dtype=np.int32), np.array([0, 0, 1, 1, 1, 1], np.float32)
    examples = [Example(tokens, weights, "gptme", "c", (0,), 1, False, "f")] * 3
    (folder / "data" / "valid.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    counts = dict.fromkeys(("examples", "tokens", "learned_tokens", "learned_turns", "exact_turns", "served_as_trained"), 3)
    split = counts | {"conversations": {"gptme": 1}, "learned_tokens_by_source": {"gptme": 3}, "turns_refused": {"why": 1}}
    policy = {"name": "plain", "what": "x"}
    info = {"max_length": 64, "role_policy": policy, "train": split, "valid": split, "test": split}
    write_dataset(folder / "data", {"train": examples, "valid": examples[:1], "test": []}, lambda: info)


def _read_dataset(folder: Path) -> None:
    from mlx_finetune.report.files_of_run import Prepared, read_as

    dataset = Dataset.open(folder / "data")
    config = make_config({"batch_size": 2}, "test")
    for step in range(2):
        dataset.batches_at(step, config)
    dataset.held_out(2)
    read_as(Prepared, folder / "data" / "dataset.json", "prepare")


READERS: dict[str, Reader] = {
    "gptme log": Reader("logs/2026-06-03-list/conversation.jsonl", _write_logs, _read_logs),
    "gptme branch": Reader("logs/2026-06-03-list/branches/other.jsonl", _write_logs, _read_logs),
    "gptme lossless": Reader("logs/2026-06-03-list/lossless.jsonl", _write_compacted, _read_logs),
    "gptme compacted": Reader("logs/2026-06-03-list/conversation.jsonl", _write_compacted, _read_logs),
    "gptme config": Reader("logs/2026-06-03-list/config.toml", _write_logs, _read_logs),
    "gptme day": Reader(
        "logs/2023-04-01.log",
        lambda f: (_text("logs/2023-04-01.log", "")(f), _lines(f / "logs/2023-04-01.log", LOG))[0],
        _read_logs,
    ),
    "tags": Reader(
        "tags.yaml",
        _text("tags.yaml", '# x\n"one": keep\n"2026-*": 2.5\ntwo: drop\n'),
        lambda folder: read_tags(folder / "tags.yaml"),
    ),
    "oasst trees": Reader("oasst.jsonl", _trees, _read_oasst),
    "oasst flat": Reader("oasst.jsonl", _flat, _read_oasst),
    "oasst threads": Reader("oasst.jsonl", _threads, _read_oasst),
    "oasst gzip": Reader("oasst.jsonl", _packed(_trees, "oasst.jsonl"), _read_oasst),
    "oasst parquet": Reader(
        "oasst.jsonl",
        _table(
            [
                {
                    "message_id": "p",
                    "parent_id": None,
                    "text": "Hi",
                    "role": "prompter",
                    "lang": "en",
                    "message_tree_id": "p",
                    "labels": {"name": ["spam"], "value": [0.5]},
                },
                {
                    "message_id": "a",
                    "parent_id": "p",
                    "text": "Ho",
                    "role": "assistant",
                    "lang": "en",
                    "message_tree_id": "p",
                    "labels": None,
                },
            ],
            "oasst.jsonl",
        ),
        _read_oasst,
        slow=True,
    ),
    **{f"chat {name}": _chat(name) for name in CHATS},
    "chat list": Reader("chats.json", _text("chats.json", json.dumps(list(CHATS.values()), indent=1)), _read_chats),
    "chat wrapped": Reader("chats.json", _text("chats.json", json.dumps({"data": list(CHATS.values())})), _read_chats),
    "chat document": Reader(
        "chats.txt",
        _text("chats.txt", "USER: Hi\nASSISTANT: Hello\n<|endoftext|>\n### User:\nHi\n### Assistant:\nHo\n"),
        _read_chats,
    ),
    "chat gzip": Reader(
        "chats.jsonl", _packed(lambda folder: _lines(folder / "chats.jsonl", CHATS.values()), "chats.jsonl"), _read_chats
    ),
    "chat parquet": Reader(
        "chats.parquet", _table([CHATS["sharegpt"], CHATS["sharegpt"]], "chats.parquet"), _read_chats, slow=True
    ),
    "collected": Reader("gptme.jsonl", _collected, _read_collected),
    "collection index": Reader("out/index.ndjson", _write_index, lambda folder: list(read_index(folder / "out"))),
    "collect.json": Reader("out/collect.json", _write_index, _read_earlier),
    "config": Reader(
        "config.yaml",
        _text("config.yaml", yaml.safe_dump(RunConfig(model="m", target_modules=("q_proj",)).to_dict())),
        _read_config,
    ),
    "setting": Reader("set.txt", _text("set.txt", "target_modules=[q_proj, v_proj]"), _read_assignment),
    "dataset.json": Reader("data/dataset.json", _dataset, _read_dataset, slow=True),
    "examples": Reader("data/train.arrow", _dataset, _read_dataset, slow=True),
}


def fresh(reader: Reader, folder: Path) -> bytes:
    """Writes the genuine folder anew and gives the bytes of the file that is to be damaged."""
    rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reader.write(folder)
    return (folder / reader.target).read_bytes()
