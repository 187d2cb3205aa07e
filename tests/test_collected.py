"""What a person reads of a collection: every source is shown, tables fit a terminal, nothing in a file moves its cursor."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mlx_finetune.cli import main
from mlx_finetune.collected import show_collection, show_examples
from mlx_finetune.data.collect import collect
from mlx_finetune.data.found import Sources
from mlx_finetune.data.refine import Settings
from mlx_finetune.data.select import Selection
from mlx_finetune.data.sources.openassistant import Options
from mlx_finetune.errors import UserError

SOURCES = ("gptme", "chat", "openassistant")
SUMMARY: dict[str, Any] = {
    "found": {source: 123_456 for source in SOURCES},
    "conversations": {source: 98_765 for source in SOURCES},
    "assistant_turns": {source: 1_234_567 for source in SOURCES},
    "characters": {source: dict.fromkeys(("system", "user", "assistant", "tool"), 3 * 10**9) for source in SOURCES},
    "bad_line_count": 0,
    "recoveries": 0,
    **{name: {} for name in ("rejected", "context_only", "formats", "system_prompts", "secrets", "distinct_secrets", "served_by")},
    "bad_lines": [],
}


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    """A row of OpenAI's format: a question, an answer, and so on."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)], **more}


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tree(name: str, answer: str, lang: str = "en") -> dict[str, Any]:
    """An OpenAssistant tree of a question and an answer."""
    base = {"review_result": True, "deleted": False, "synthetic": False, "lang": lang}
    reply = base | {"message_id": f"a-{name}", "text": answer, "role": "assistant", "replies": []}
    root = base | {"message_id": f"p-{name}", "text": f"Why does it fail in {name}?", "role": "prompter", "replies": [reply]}
    return {"message_tree_id": name, "tree_state": "ready_for_export", "prompt": root}


def test_the_tables_of_three_sources_fit_eighty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    show_collection(SUMMARY)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for source in SOURCES:
        found, tokens = [line.split() for line in lines if line.split()[:1] == [source]]
        assert found == [source, "123,456", "98,765", "24,691", "1,234,567"]
        assert tokens == [source, *["909,090,909"] * 4]


def test_formats_are_named_so_whether_they_call_tools_or_not(capsys: pytest.CaptureFixture[str]) -> None:
    show_collection(SUMMARY | {"formats": {"sharegpt": 3, "markdown": 2}})
    assert "\nformats\n" in capsys.readouterr().out


def test_nothing_that_a_file_says_moves_the_cursor_or_is_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    bad = {"file": "a\x1b[2J\n.jsonl", "line": 1, "reason": "no\x9b\u202eJSON"}
    odd = {name: {"[/x] \x1b[31m :smile: [bold]": 1} for name in ("rejected", "context_only", "formats", "served_by")}
    show_collection(SUMMARY | odd | {"bad_lines": [bad], "bad_line_count": 1})
    out = capsys.readouterr().out
    assert out.count("[/x] [31m :smile: [bold]") == 3
    assert "skipped: a [2J .jsonl:1: no  JSON" in out
    assert all(line.isprintable() for line in out.splitlines())


def test_a_long_table_ends_with_the_count_of_what_it_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    show_collection(SUMMARY | {"rejected": {f"reason {i}": 100 - i for i in range(50)}})
    out = capsys.readouterr().out
    assert "reason 19 " in out and "reason 20 " not in out
    assert re.search(rf"and 30 others, in collect.json +{sum(range(51, 81)):,} \n", out)


def test_reasons_are_counted_without_places_and_values_also_after_an_update(tmp_path: Path) -> None:
    result = {"role": "tool", "content": "x"}
    rows = [chat(f"Question {i * 77}", "Yes.") for i in range(2)]
    for i in range(300):
        row = chat(f"Question {i}", "Yes.")
        row["messages"].insert(1 + i % 2, {**result, "tool_call_id": f"call_{i:08x}"})
        rows.append(row)
    source = Sources(chats=(str(write_rows(tmp_path / "a.jsonl", *rows)), str(write_rows(tmp_path / "b.jsonl", rows[-1]))))
    expected = {"tool_call_id: answers no call before it": 301}
    assert collect(source, Settings(), tmp_path / "out")["rejected"] == expected
    detail = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert "messages[1].tool_call_id: 'call_0000002a': answers no call before it" in detail
    write_rows(tmp_path / "b.jsonl", rows[-1], rows[-2])
    assert collect(source, Settings(), tmp_path / "out", update=True)["rejected"] == {next(iter(expected)): 302}


def shown(out: str, title: str) -> list[str]:
    """The first words of the lines under a title."""
    lines = out.partition(f"{title}, for example:\n")[2].splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith(" ")), len(lines))
    return [line.split()[0] for line in lines[:end] if not line.startswith("    ")]


def test_examples_are_of_every_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, count in (("gptme", 1), ("chat", 20), ("openassistant", 20)):
        rows = [chat("Hi", "Hello", id=f"{source}-{i}", source=source, meta={"name": f"n{i}"}) for i in range(count)]
        write_rows(tmp_path / f"{source}.jsonl", *rows)
    rejected = [{"id": f"t{i}", "source": "openassistant", "reason": "no reply"} for i in range(2000)]
    rejected[700] = {"id": "log", "source": "gptme", "reason": "no messages"}
    rejected[1500] = {"id": "row", "source": "chat", "reason": "no messages"}
    write_rows(tmp_path / "rejected.jsonl", *rejected)
    summary = {"conversations": {"openassistant": 20, "gptme": 1, "chat": 20}}
    show_examples(tmp_path, summary)
    out = capsys.readouterr().out
    assert shown(out, "kept") == ["openassistant", "openassistant", "gptme", "chat", "chat"]
    assert sorted(shown(out, "rejected")) == ["chat", "gptme", *["openassistant"] * 3]
    assert "  gptme log: no messages\n" in out
    show_examples(tmp_path, summary)
    assert capsys.readouterr().out == out


def test_examples_are_five_where_there_is_one_source_and_fewer_where_there_are_fewer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [chat("Hi", "Hello", id=f"c{i}", source="chat", meta={"name": f"n{i}"}) for i in range(9)]
    write_rows(tmp_path / "chat.jsonl", *rows)
    write_rows(tmp_path / "rejected.jsonl", *({"id": f"r{i}", "source": "chat", "reason": "empty"} for i in range(3)))
    show_examples(tmp_path, {"conversations": {"chat": 9, "gptme": 0}})
    out = capsys.readouterr().out
    assert shown(out, "kept") == ["chat"] * 5 and shown(out, "rejected") == ["chat"] * 3
    assert len(set(re.findall(r"  chat (n\d)", out))) == 5


def test_an_error_is_printed_without_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["collect", "--no-gptme", "--chat", "gone\x1b[2J\x9b.jsonl"])
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-2]
    assert error == "error: gone [2J .jsonl: no such file"


ENGLISH = tree("one", "Because `x` is not set; run `export x=1` in the shell.")
NOTHING_LEFT: list[tuple[Sequence[Any], Sequence[Any], Settings, Options, str]] = [
    ([], [ENGLISH], Settings(), Options(languages=("xx",)), "--language"),
    ([], [tree("one", "Because of the weather.")], Settings(), Options(), "--relevant any"),
    ([], [tree("one", "As an AI language model I cannot say.")], Settings(), Options(relevant="any"), "--no-openassistant-filters"),
    ([], [ENGLISH | {"tree_state": "growing"}], Settings(), Options(), "OpenAssistant"),
    ([chat("Hi", "Ho")], [], Settings(selection=Selection(since="2030-01-01T00:00:00Z")), Options(), "--since and --until"),
    ([chat("Hi", "Ho")], [], Settings(selection=Selection(titles=("x",))), Options(), "--title"),
    ([chat("Hi", "Ho")], [], Settings(selection=Selection(exclude=("*",))), Options(), "--exclude"),
    ([chat("Hi", "Ho")], [], Settings(selection=Selection(tags={"*": "drop"})), Options(), "tags"),
    ([chat("Hi", "Ho", split="TEST")], [], Settings(), Options(), "another split"),
    ([chat("Hi")], [], Settings(), Options(), "a user turn and an assistant turn"),
]


@pytest.mark.parametrize("chats, trees, settings, options, hint", NOTHING_LEFT)
def test_where_nothing_is_left_the_hint_follows_the_main_reason(
    tmp_path: Path, chats: Sequence[Any], trees: Sequence[Any], settings: Settings, options: Options, hint: str
) -> None:
    named = {name: write_rows(tmp_path / name, *rows) for name, rows in (("chats.jsonl", chats), ("trees.jsonl", trees)) if rows}
    places = [(str(named[name]),) if name in named else () for name in ("trees.jsonl", "chats.jsonl")]
    with pytest.raises(UserError) as refused:
        collect(Sources(None, *places, options), settings, tmp_path / "out")
    assert hint in refused.value.hint, (refused.value.message, refused.value.hint)


def test_where_nothing_is_left_only_the_commonest_reasons_are_named(tmp_path: Path) -> None:
    tools = [{"role": "tool", "content": "x"}]
    odd = [
        {"messages": [*chat("Q")["messages"], *tools]},
        chat("Q", "A", split="TEST"),
        chat("Q", "A", label=False),
        chat("Q", "A", judgement="FAIL"),
        {"messages": []},
        chat("Q"),
        {"prompt": "Q", "completion": ""},
    ]
    path = write_rows(tmp_path / "a.jsonl", *[chat("Q", "A", split="TEST")] * 3, *odd)
    with pytest.raises(UserError) as refused:
        collect(Sources(chats=(str(path),)), Settings(), tmp_path / "out")
    assert "cleaning: split: a test split, such as OpenPipe's, is never learned (4); " in refused.value.message
    assert refused.value.message.endswith("; and 2 other reasons")
