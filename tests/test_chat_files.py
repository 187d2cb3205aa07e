"""Whatever a chat file is packed in: its rows come one by one, what is broken is named, nothing is held that is too large."""

import gzip
import io
import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_finetune.data.conversation import Conversation
from mlx_finetune.data.sources import BadLine, chat_files, chat_tables, gather
from mlx_finetune.data.sources.chat_formats import read
from mlx_finetune.data.sources.chat_values import NotJson
from mlx_finetune.errors import UserError

ROWS = [
    {"messages": [{"role": "user", "content": f"Question {i} ✓"}, {"role": "assistant", "content": "Yes."}]} for i in range(1, 4)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
BOM = "\ufeff"


def questions(source: Path | str) -> list[str]:
    """The first message of each conversation."""
    return [conversation.messages[0].content for conversation in gather(read(source)).conversations]


EXPECTED = ["Question 1 ✓", "Question 2 ✓", "Question 3 ✓"]
PACKED: dict[str, str] = {
    "lines.jsonl": LINES,
    "no_name_that_helps": LINES,
    "lines.json": LINES,
    "bom.jsonl": BOM + LINES,
    "crlf.jsonl": LINES.replace("\n", "\r\n"),
    "blank_lines.jsonl": "\n  \n" + LINES.replace("\n", "\n\n\t\n"),
    "no_last_newline.jsonl": LINES[:-1],
    "list.json": json.dumps(ROWS),
    "list.jsonl": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "pretty.txt": BOM + "\n" + json.dumps(ROWS, indent=2).replace("\n", "\r\n"),
    "list_of_lines.json": "[" + LINES.strip().replace("\n", ",\n") + "]",
    "list_of_lines.jsonl": "[\n" + LINES.strip().replace("\n", ",\n") + "\n]\n",
    "data.json": json.dumps({"version": 1, "data": ROWS}),
    "train.json": json.dumps({"train": ROWS}, indent=1),
    "train_first.json": json.dumps({"train": ROWS, "test": ROWS}, indent=1),
    "objects.json": "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "lists.jsonl": "".join(json.dumps(row["messages"]) + "\n" for row in ROWS),
    "far_away.json": " " * 3 * 2**20 + json.dumps(ROWS, indent=1),
    "documents.txt": "<|endoftext|>\n".join(CHATML.format(question) for question in EXPECTED),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name, text", PACKED.items(), ids=PACKED)
def test_rows_are_found_in_whatever_they_are_packed(tmp_path: Path, name: str, text: str, packed: bool) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    found = gather(read(path))
    assert [one.messages[0].content for one in found.conversations] == EXPECTED
    assert found.rejected == found.bad_lines == ()
    assert len({one.name for one in found.conversations}) == 3
    assert all(one.name.startswith(f"{name}:") for one in found.conversations)


@pytest.mark.parametrize("indent", [None, 1])
def test_one_chat_may_be_a_whole_file(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "one.json"
    for row in (ROWS[0], ROWS[0]["messages"]):
        path.write_text(json.dumps(row, indent=indent))
        assert questions(path) == EXPECTED[:1]
    path.write_text(CHATML.format("Hi"))
    assert questions(path.rename(tmp_path / "one.txt")) == ["Hi"]


def test_rows_are_named_by_line_or_by_their_place_in_the_list(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + LINES)
    assert [one.name for one in gather(read(path)).conversations] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]
    path.write_text(json.dumps([*ROWS[:2], 5, ROWS[2]], indent=1))
    found = gather(read(path))
    assert [one.name for one in found.conversations] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4"]
    (bad,) = found.bad_lines
    assert path.read_text().splitlines()[bad.line - 1].strip() == "5,"


BROKEN_LINES: dict[str, tuple[bytes, str]] = {
    "cut off": (b'{"messages": [{"role": "us', "not JSON, or cut off: Unterminated string starting, column 24"),
    "not UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 in column 14"),
    "too deep": (b"[" * 100_000, "not read: nested too deeply"),
    "too many digits": (b'{"messages": ' + b"9" * 5000 + b"}", "Exceeds the limit (4300 digits) for integer string conversion"),
    "two rows": (b"{} {}", "not JSON, or cut off: Extra data, column 4"),
    "free text": (b"Hello", "not JSON, or cut off: Expecting value, column 1"),
    "zeros": (b"\0\0\0", "not JSON, or cut off: Expecting value, column 1"),
}


@pytest.mark.parametrize("raw, reason", BROKEN_LINES.values(), ids=BROKEN_LINES)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_broken_line_is_named_and_reading_goes_on(tmp_path: Path, raw: bytes, reason: str, place: int) -> None:
    path = tmp_path / "a.jsonl"
    lines = LINES.encode().splitlines()
    path.write_bytes(b"\n".join([*lines[:place], raw, *lines[place:]]))
    found = gather(read(path))
    assert [one.messages[0].content for one in found.conversations] == EXPECTED
    (bad,) = found.bad_lines
    assert bad.line == place + 1 and bad.reason.startswith(reason)


def test_a_list_is_read_up_to_where_it_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    whole = json.dumps(ROWS, indent=1)
    for text, reason in [
        (whole[: whole.rindex("Yes")], "not JSON, or cut off: Unterminated string starting"),
        (whole[: whole.rindex(",\n")].rsplit("},", 1)[0] + '}, {"messages" []}]', "not JSON, or cut off: Expecting ':' delimiter"),
        (json.dumps(ROWS[:2], indent=1)[:-1], "cut off: the list is not closed"),
        (json.dumps(ROWS[:2], indent=1)[:-1] + "," + "[" * 100_000, "not read: nested too deeply; nothing behind it was read"),
    ]:
        path.write_text(text)
        found = gather(read(path))
        assert [one.messages[0].content for one in found.conversations][:1] == EXPECTED[:1]
        (bad,) = found.bad_lines
        assert bad.reason.startswith(reason) and bad.line > 1


def test_a_line_that_is_too_long_is_passed_over_without_being_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_files, "LONGEST_ROW", 2**20)
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(LINES.encode() + b'{"text": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + LINES.encode())
    tracemalloc.start()
    found = gather(read(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [one.messages[0].content for one in found.conversations] == EXPECTED * 2
    assert [(bad.line, bad.reason) for bad in found.bad_lines] == [(4, "longer than 1 MB")]
    assert peak < 16 * 2**20


def test_a_row_may_be_64_megabytes_long_and_no_longer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = json.dumps({"prompt": "Hi", "completion": "@"})
    for length, kept in [(chat_files.LONGEST_ROW - len(row) + 1, True), (chat_files.LONGEST_ROW - len(row) + 2, False)]:
        path.write_text(LINES + row.replace("@", "x" * length))
        assert len(gather(read(path)).conversations) == 3 + kept


@pytest.mark.parametrize("start, end", [("[", "]"), ('{\n"data": [', '], "version": 1}')])
def test_a_long_list_is_never_held_whole(tmp_path: Path, start: str, end: str) -> None:
    path, row = tmp_path / "a.json", json.dumps({"prompt": "Hi", "completion": "Yes." * 1000})
    path.write_text(f"{start}{row}" + f",{row}" * 5_000 + end)
    tracemalloc.start()
    assert all(isinstance(item, Conversation) for item in read(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 20_000_000 and peak < 10_000_000


def text_table(folder: Path, name: str) -> Path:
    """A parquet file of the rows, and of one more column that only one of them fills."""
    import pyarrow
    import pyarrow.parquet

    path = folder / name
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"name": "g", "arguments": {"b": 2}}}]
    rows = [*ROWS, {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": None, "tool_calls": calls}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_is_read_without_the_nulls_that_a_table_fills_in(tmp_path: Path) -> None:
    found = gather(read(text_table(tmp_path, "a.table"))).conversations
    assert [one.messages[0].content for one in found] == [*EXPECTED, "Q"]
    assert [call.arguments for call in found[3].messages[1].tool_calls] == ['{"a": 1}', '{"b": 2}']
    assert found[3].name == "a.table:4"


def test_values_of_a_table_that_json_has_not_are_made_plain() -> None:
    import datetime

    odd = {"a": None, "b": float("nan"), "c": datetime.date(2026, 1, 2), "d": b"x", "g": {"h": None}, "i": 1.5}
    maps = {"e": [("f", None), (b"j", [[("k", 2)]])], "l": [], "m": b"\xff", "n": datetime.timedelta(1)}
    assert chat_tables.plain(odd | maps) == {
        **{"c": "2026-01-02", "d": "x", "g": {}, "i": 1.5},
        **{"e": {"j": [{"k": 2}]}, "l": [], "m": NotJson("binary data"), "n": NotJson("a value of type timedelta")},
    }


def test_binary_columns_are_read_as_text_or_refused_by_their_field(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    columns = {"prompt": [b"Hi", b"Hi", b"caf\xe9"], "completion": ["Åh".encode(), b"\xff\xfe", b"Yes."], "image": [b"\x89PNG"] * 3}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    found = gather(read(path))
    assert [[m.content for m in one.messages] for one in found.conversations] == [["Hi", "Åh"]]
    assert [(bad.line, bad.reason) for bad in found.bad_lines] == [
        (2, "completion: binary data is not a list"),
        (3, "prompt: binary data is not a list"),
    ]
    message = pyarrow.struct([("role", pyarrow.binary()), ("content", pyarrow.binary())])
    chats = [[{"role": b"user", "content": content}, {"role": b"assistant", "content": b"Yes."}] for content in (b"Hi", b"\xff")]
    pyarrow.parquet.write_table(pyarrow.table({"messages": pyarrow.array(chats, pyarrow.list_(message))}), path)
    found = gather(read(path))
    assert [one.messages[0].content for one in found.conversations] == ["Hi"]
    assert [bad.reason for bad in found.bad_lines] == ["messages[0].content: binary data is not text"]


def test_maps_of_a_table_are_objects(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path, text_map = tmp_path / "a.parquet", pyarrow.map_(pyarrow.string(), pyarrow.string())
    pairs = [[[*one.items()] for one in row["messages"]] for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.table({"messages": pyarrow.array(pairs, pyarrow.list_(text_map))}), path)
    assert questions(path) == EXPECTED
    call = pyarrow.struct([("name", pyarrow.string()), ("arguments", text_map)])
    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string()), ("tool_calls", pyarrow.list_(call))])
    calls = [{"name": "f", "arguments": [("a", "1")]}, {"name": "g", "arguments": []}]
    messages = pyarrow.array(
        [[{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": calls}]], pyarrow.list_(message)
    )
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), path)
    (found,) = gather(read(path)).conversations
    assert [call.arguments for call in found.messages[1].tool_calls] == ['{"a": "1"}', "{}"]


def test_what_is_null_in_a_table_is_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    columns = {"instruction": ["Hi", "Hi"], "input": pyarrow.array([None, None], pyarrow.string()), "output": ["Hello", None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    found = gather(read(path))
    assert [len(one.messages) for one in found.conversations] == [2]
    assert [(bad.line, bad.reason) for bad in found.bad_lines] == [(2, "output: nothing")]


def test_a_folder_that_datasets_saved_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert questions(tmp_path / "one") == EXPECTED
    splits = {"train": datasets.Dataset.from_list(ROWS[:1]), "more": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    assert questions(tmp_path / "two") == EXPECTED
    arrays = {"prompt": ["Hi"], "completion": ["Yes."], "scores": [[1, 2]]}
    datasets.Dataset.from_dict(arrays).with_format("numpy").save_to_disk(tmp_path / "arrays")
    assert questions(tmp_path / "arrays") == ["Hi"]
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded as a dataset"):
        gather(read(tmp_path / "one"))


def test_the_test_split_that_datasets_saved_is_not_learned(tmp_path: Path) -> None:
    import datasets

    splits = {"train": datasets.Dataset.from_list(ROWS[:2]), "test": datasets.Dataset.from_list(ROWS[2:])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    found = gather(read(tmp_path / "two"))
    assert [one.messages[0].content for one in found.conversations] == EXPECTED[:2]
    assert [one.reason for one in found.rejected] == ["split: 'test': a test split, such as OpenPipe's, is never learned"]


def test_a_file_of_a_folder_that_holds_no_chat_is_named_once_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(LINES)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "info.json").write_text('{"rows": 3}')
    (tmp_path / "log.jsonl").write_text('\n{"role": "user", "content": "Hi", "timestamp": "x"}\n' * 3)
    found = gather(read(tmp_path))
    assert len(found.conversations) == 3
    assert [(bad.path.name, bad.line, bad.reason.partition(":")[0]) for bad in found.bad_lines] == [
        ("deep.json", 1, "not read"),
        ("empty.json", 0, "no row in it"),
        ("info.json", 1, "no chat"),
        ("log.jsonl", 2, "a message of a gptme log, not a chat"),
    ]


def test_a_folder_gives_all_chat_files_in_it_and_names_the_others(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.jsonl").write_text(LINES)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "README.md").write_text("About it.")
    (tmp_path / ".hidden.jsonl").write_text(LINES)
    (tmp_path / "info.json").write_text('{"rows": 3}')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "b" / "c.jsonl")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    (tmp_path / "up").symlink_to(tmp_path)
    text_table(tmp_path, "t.parquet")
    found = gather(read(tmp_path))
    assert [one.name for one in found.conversations] == [
        *("a.json.gz:1", "a.json.gz:2", "a.json.gz:3"),
        *("b/c.jsonl:1", "b/c.jsonl:2", "b/c.jsonl:3"),
        *("t.parquet:1", "t.parquet:2", "t.parquet:3", "t.parquet:4"),
    ]
    assert {bad.path.name for bad in found.bad_lines} == {"broken.parquet", "info.json", "link.jsonl", "loop.json"}


def test_a_folder_without_a_chat_is_refused_by_what_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat file in it"):
        gather(read(tmp_path))
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "log.jsonl").write_text('{"role": "user", "content": "Hi", "timestamp": "x"}')
    (tmp_path / "z.json").write_text("{}")
    with pytest.raises(UserError) as refused:
        gather(read(tmp_path))
    assert "mlx-finetune collect LOGS" in refused.value.hint


def zipped() -> bytes:
    """A zip archive with a chat file in it."""
    import zipfile

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("chats.jsonl", LINES)
    return packed.getvalue()


WHOLE = gzip.compress(LINES.encode() * 50)
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"", "no row in it"),
    "blank.txt": (b" \n\n", "no row in it"),
    "empty_list.json": (b"[]", "no row in it"),
    "free.txt": (b"The sky is blue.\n", "free text without speakers"),
    "table.csv": (b"text,label\nHi,1\n", "free text without speakers"),
    "latin1.txt": (b"User: caf\xe9\nAssistant: Yes.", "not UTF-8: byte 0xe9 at place 10 of the file"),
    "latin1.jsonl": (b'{"text": "caf\xe9"}', ":1: not UTF-8: byte 0xe9 in column 14"),
    "latin1.json": (b'[\n{"text": "caf\xe9"}\n]', "not UTF-8: byte 0xe9 at place 16 of the file"),
    "utf16.jsonl": (LINES.encode("utf-16"), "UTF-16 text, not a chat file"),
    "a.zip": (zipped(), "a zip archive, not a chat file"),
    "cut.jsonl.gz": (WHOLE[:-20], "broken gzip file: Compressed file ended"),
    "head.gz": (WHOLE[:5], "broken gzip file"),
    "changed.gz": (WHOLE[:12] + b"\xff" * 8 + WHOLE[20:], "broken gzip file"),
    "twice.gz": (gzip.compress(WHOLE), "packed twice"),
    "a.parquet": (b"PAR1" + b"\0" * 50 + b"PAR1", "broken parquet file"),
    "not.parquet": (b"Hello", "free text without speakers"),
    "numbers.json": (b"[1, 2, 3]", "a number is no chat"),
    "broken.json": (b'{"messages": [\n{"role": }', ":2: not JSON, or cut off: Expecting value"),
}


@pytest.mark.parametrize("name, raw, message", [(name, *rest) for name, rest in REFUSED.items()], ids=REFUSED)
def test_a_file_that_is_no_chat_file_is_refused_in_one_line(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(UserError) as refused:
        gather(read(path))
    assert message in refused.value.message and refused.value.message.startswith(f"{path}")
    assert "\n" not in refused.value.message and refused.value.hint


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for source, message in [
        (tmp_path / "pipe.jsonl", "not an ordinary file"),
        (tmp_path / "loop", "a link, not followed"),
        (tmp_path / "nowhere", "No such file"),
        (tmp_path / "gone.jsonl", "no such file"),
        ("data/gone.jsonl.gz", "no such file"),
        ("gone", "no such file"),
        ("a\0b", "a?b: no such file"),
        ("x" * 5000, "no such file"),
    ]:
        with pytest.raises(UserError, match=message):
            gather(read(source))


def test_a_link_that_was_named_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "link").symlink_to("a.jsonl")
    assert questions(tmp_path / "link") == EXPECTED


def test_a_dataset_that_the_hub_does_not_give_is_one_line_with_how_to_name_it() -> None:
    with pytest.raises(UserError) as refused:
        gather(read("nobody-at-all/no-such-dataset:config@train"))
    assert refused.value.message.startswith("nobody-at-all/no-such-dataset:config@train: ")
    assert "org/name:config@split" in refused.value.hint and "\n" not in refused.value.message


def test_only_what_can_be_a_dataset_is_looked_for_on_the_hub() -> None:
    found = [chat_tables.HUB_ID.fullmatch(name) for name in ("a/b", "a/b:c", "a/b@test", "a-1/b.c:d@e")]
    assert [match.groups() if match else None for match in found] == [
        ("a/b", None, None),
        ("a/b", "c", None),
        ("a/b", None, "test"),
        ("a-1/b.c", "d", "e"),
    ]
    assert not any(chat_tables.HUB_ID.fullmatch(name) for name in ("a", "/a/b", "a/b/c", "~/a b", "a/b:", ""))


def mutations(random: np.random.Generator) -> list[Callable[[bytes], bytes]]:
    """Ways to spoil a file."""
    return [
        lambda raw: raw[: random.integers(len(raw) + 1)],
        lambda raw: raw[random.integers(len(raw) + 1) :],
        lambda raw: bytes(random.integers(256) if random.random() < 0.01 else byte for byte in raw),
        lambda raw: raw.replace(
            *[(b'"', b""), (b",", b""), (b"}", b"]"), (b"\n", b""), (b":", b"\0"), (b"[", b"{")][random.integers(6)]
        ),
    ]


def test_random_and_spoiled_bytes_give_items_or_one_error(tmp_path: Path) -> None:
    random, outcomes = np.random.default_rng(11), {"items": 0, "error": 0}
    whole = [text.encode() for name, text in PACKED.items() if name != "far_away.json"]
    whole += [gzip.compress(raw) for raw in whole] + [text_table(tmp_path, "t.parquet").read_bytes()]
    starts = [b"", b"{", b"[", b"PAR1", b"\x1f\x8b\x08", b'[{"', b"\xef\xbb\xbf", b"<|im_start|>user\n", b"\n"]
    for i in range(1500):
        raw = starts[i % len(starts)] + random.bytes(random.integers(200)) if i % 3 == 0 else whole[i % len(whole)]
        if i % 3:
            spoil = mutations(random)
            raw = spoil[random.integers(len(spoil))](raw)
        path = tmp_path / ["a.jsonl", "a.json", "a.txt", "a"][i % 4]
        path.write_bytes(raw)
        try:
            found = gather(read(path))
        except UserError as error:
            assert "\n" not in error.message
            outcomes["error"] += 1
        else:
            assert found.conversations or found.rejected or found.bad_lines
            assert all(isinstance(bad, BadLine) and bad.reason for bad in found.bad_lines)
            outcomes["items"] += 1
    assert min(outcomes.values()) > 100


def wide_rows(n: int) -> dict[str, dict[str, Any]]:
    """Rows that are slow where a reader looks at everything again for every message, sign or blank."""
    result: dict[str, Any] = {"role": "tool", "content": "x"}
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": f"f{i % 7}", "arguments": {}}} for i in range(n)]}
    named = [{**result, "name": f"f{i % 7}"} for i in range(n)]
    return {
        "results": {"messages": [calls, *[result] * n]},
        "too few results": {"messages": [calls, *[result] * (n - 1)]},
        "named results": {"messages": [calls, *named]},
        "headers": {"text": "<|im_start|>user\n" * n},
        "ends": {"text": "<|im_start|>user\nHi<|im_start|>assistant\nHo" + "<|im_end|> " * n},
        "blanks": {"text": "### Human:" + " " * n + "### Assistant:" + "\n" * n + "x"},
        "system marks": {"text": "[INST]" + "<<SYS>>" * n},
        "starts": {"text": " " * n + "<s>" * n},
        "speakers": {"prompt": "User:\n" * n, "completion": "User:\n" * n},
        "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * n}]},
    }


@pytest.mark.parametrize("kind", wide_rows(1))
def test_wide_rows_take_time_in_proportion_to_their_size(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jsonl"

    def seconds(n: int) -> float:
        path.write_text(json.dumps(wide_rows(n)[kind]))
        times = []
        for _ in range(2):
            start = time.process_time()
            assert len(list(read(path))) == 1
            times.append(time.process_time() - start)
        return max(min(times), 0.005)

    assert seconds(16_000) / seconds(1_000) < 64  # 16 in proportion, 256 if it were its square
