"""Chats in tables: parquet files, folders that `datasets` saved, and data sets of the hub."""

from pathlib import Path

import pytest
from packed_chats import EXPECTED, ROWS, questions, text_table

from mlx_finetune.data.sources import chat_tables, gather
from mlx_finetune.data.sources.chat_formats import read
from mlx_finetune.data.sources.chat_values import NotJson
from mlx_finetune.errors import UserError


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
