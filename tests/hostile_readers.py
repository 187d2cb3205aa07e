"""Every reader of data that strangers or a crash may have written: a genuine folder, the file that is damaged, the call."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

import yaml
from genuine_files import (
    CHATS,
    LOG,
    packed,
    table,
    text_file,
    write_collected,
    write_compacted,
    write_flat,
    write_index,
    write_lines,
    write_logs,
    write_prepared,
    write_threads,
    write_trees,
)

from mlx_finetune.config import RunConfig, load_config, make_config, parse_assignments
from mlx_finetune.data.collection import earlier_collection, read_index
from mlx_finetune.data.conversation import Conversation, conversation_of_line, read_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.entries import entries, read_entry
from mlx_finetune.data.sources import Item, chat_formats, gptme, openassistant
from mlx_finetune.data.sources.openassistant import EVERYTHING
from mlx_finetune.data.tags import read_tags
from mlx_finetune.errors import UserError

LONGEST = 500  # characters of a message, without the place


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


def _read_logs(folder: Path) -> None:
    check_items(gptme.read(folder / "logs"))


def _read_oasst(folder: Path) -> None:
    check_items(openassistant.read(folder / "oasst.jsonl", EVERYTHING))


def _chat(name: str) -> Reader:
    return Reader("chats.jsonl", lambda folder: write_lines(folder / "chats.jsonl", [CHATS[name], CHATS[name]]), _read_chats)


def _read_chats(folder: Path) -> None:
    check_items(chat_formats.read(next(folder.glob("chats.*"))))


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


def _read_earlier(folder: Path) -> None:
    asked = {"settings": {"selection": {"tags": {}}}, "sources": {"logs": str(folder / "logs"), "chats": [], "openassistant": []}}
    earlier_collection(folder / "out", asked)


def _read_config(folder: Path) -> None:
    config = load_config(folder / "config.yaml", {})
    assert RunConfig.model_validate(config.to_dict()) == config


def _read_assignment(folder: Path) -> None:
    text = (folder / "set.txt").read_bytes().decode("utf-8", errors="replace")
    make_config(parse_assignments([text]), "the command line")


def _read_dataset(folder: Path) -> None:
    from mlx_finetune.report.files_of_run import Prepared, read_as

    dataset = Dataset.open(folder / "data")
    config = make_config({"batch_size": 2}, "test")
    for step in range(2):
        dataset.batches_at(step, config)
    dataset.held_out(2)
    read_as(Prepared, folder / "data" / "dataset.json", "prepare")


READERS: dict[str, Reader] = {
    "gptme log": Reader("logs/2026-06-03-list/conversation.jsonl", write_logs, _read_logs),
    "gptme branch": Reader("logs/2026-06-03-list/branches/other.jsonl", write_logs, _read_logs),
    "gptme lossless": Reader("logs/2026-06-03-list/lossless.jsonl", write_compacted, _read_logs),
    "gptme compacted": Reader("logs/2026-06-03-list/conversation.jsonl", write_compacted, _read_logs),
    "gptme config": Reader("logs/2026-06-03-list/config.toml", write_logs, _read_logs),
    "gptme day": Reader(
        "logs/2023-04-01.log",
        lambda f: (text_file("logs/2023-04-01.log", "")(f), write_lines(f / "logs/2023-04-01.log", LOG))[0],
        _read_logs,
    ),
    "tags": Reader(
        "tags.yaml",
        text_file("tags.yaml", '# x\n"one": keep\n"2026-*": 2.5\ntwo: drop\n'),
        lambda folder: read_tags(folder / "tags.yaml"),
    ),
    "oasst trees": Reader("oasst.jsonl", write_trees, _read_oasst),
    "oasst flat": Reader("oasst.jsonl", write_flat, _read_oasst),
    "oasst threads": Reader("oasst.jsonl", write_threads, _read_oasst),
    "oasst gzip": Reader("oasst.jsonl", packed(write_trees, "oasst.jsonl"), _read_oasst),
    "oasst parquet": Reader(
        "oasst.jsonl",
        table(
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
    "chat list": Reader("chats.json", text_file("chats.json", json.dumps(list(CHATS.values()), indent=1)), _read_chats),
    "chat wrapped": Reader("chats.json", text_file("chats.json", json.dumps({"data": list(CHATS.values())})), _read_chats),
    "chat document": Reader(
        "chats.txt",
        text_file("chats.txt", "USER: Hi\nASSISTANT: Hello\n<|endoftext|>\n### User:\nHi\n### Assistant:\nHo\n"),
        _read_chats,
    ),
    "chat gzip": Reader(
        "chats.jsonl", packed(lambda folder: write_lines(folder / "chats.jsonl", CHATS.values()), "chats.jsonl"), _read_chats
    ),
    "chat parquet": Reader("chats.parquet", table([CHATS["sharegpt"], CHATS["sharegpt"]], "chats.parquet"), _read_chats, slow=True),
    "collected": Reader("gptme.jsonl", write_collected, _read_collected),
    "collection index": Reader("out/index.ndjson", write_index, lambda folder: list(read_index(folder / "out"))),
    "collect.json": Reader("out/collect.json", write_index, _read_earlier),
    "config": Reader(
        "config.yaml",
        text_file("config.yaml", yaml.safe_dump(RunConfig(model="m", target_modules=("q_proj",)).to_dict())),
        _read_config,
    ),
    "setting": Reader("set.txt", text_file("set.txt", "target_modules=[q_proj, v_proj]"), _read_assignment),
    "dataset.json": Reader("data/dataset.json", write_prepared, _read_dataset, slow=True),
    "examples": Reader("data/train.arrow", write_prepared, _read_dataset, slow=True),
}


def fresh(reader: Reader, folder: Path) -> bytes:
    """Writes the genuine folder anew and gives the bytes of the file that is to be damaged."""
    rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reader.write(folder)
    return (folder / reader.target).read_bytes()
