"""Whatever a chat file is packed in: its rows come one by one, what is broken is named, nothing is held that is too large."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
from packed_chats import CHATML, EXPECTED, LINES, PACKED, ROWS, questions, text_table

from mlx_finetune.data.conversation import Conversation
from mlx_finetune.data.sources import chat_files, gather
from mlx_finetune.data.sources.chat_formats import read
from mlx_finetune.errors import UserError


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


def test_a_link_that_was_named_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "link").symlink_to("a.jsonl")
    assert questions(tmp_path / "link") == EXPECTED
