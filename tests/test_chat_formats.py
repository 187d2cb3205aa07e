"""Chat files of other programs: a row of each format becomes our messages, and is read back as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_rows import ASKED, ASKED_MESSAGE, BARE, CALL, CALLED, FORMATS, RESULT, TOOL, assistant, chat, one

from mlx_finetune.data.conversation import Conversation, Message, ToolCall


@pytest.mark.parametrize("row, shape, messages", FORMATS.values(), ids=FORMATS)
def test_a_row_of_each_format_becomes_its_messages(tmp_path: Path, row: Any, shape: str, messages: tuple[Message, ...]) -> None:
    found = one(tmp_path, row)
    assert isinstance(found, Conversation), found
    assert found.messages == messages
    assert (found.source, found.meta["format"], found.license) == ("chat", shape, "unknown")
    assert found.name == found.group == "chats.jsonl:1"


def test_where_a_row_has_the_keys_of_several_formats_the_first_of_a_fixed_order_wins(tmp_path: Path) -> None:
    row: dict[str, Any] = {"text": FORMATS["Guanaco"][0]["text"]}
    for more, shape in [
        ({"prompt": "P", "completion": "C"}, "completion"),
        ({"instruction": "I", "output": "O"}, "alpaca"),
        ({"input": chat(ASKED), "output": {"choices": [{"message": assistant()}]}}, "openpipe"),
        ({"conversations": [ASKED, assistant()]}, "sharegpt"),
        ({"messages": [ASKED, assistant()]}, "openai"),
    ]:
        row |= more
        assert one(tmp_path, row).meta["format"] == shape


def test_results_without_ids_answer_the_calls_in_order_or_by_name(tmp_path: Path) -> None:
    second = {"function": {"name": "time", "arguments": {}}}
    calls = assistant(content=None, tool_calls=[{**CALL, "id": None}, second])
    for results, answered in [
        ([BARE, BARE], ["call_1", "call_2"]),
        ([{**BARE, "name": "time"}, {**BARE, "name": "weather"}], ["call_2", "call_1"]),
    ]:
        found = one(tmp_path, chat(ASKED, calls, *results))
        assert [call.id for call in found.messages[1].tool_calls] == ["call_1", "call_2"]
        assert [message.tool_call_id for message in found.messages[2:]] == answered


def test_arguments_are_json_text_whether_they_were_text_or_an_object(tmp_path: Path) -> None:
    for arguments, text in [({"city": "Ås"}, '{"city": "Ås"}'), ('{ "city":"Ås" }', '{ "city":"Ås" }'), ("", "{}"), (None, "{}")]:
        found = one(tmp_path, chat(assistant(tool_calls=[{"function": {"name": "f", "arguments": arguments}}])))
        assert found.messages[0].tool_calls == (ToolCall("call_1", "f", text),)


@pytest.mark.parametrize(
    "field, value",
    [
        ("tools", [TOOL]),
        ("tools", json.dumps([TOOL])),
        ("functions", [TOOL["function"]]),
        ("tools", [{"type": "function", **TOOL["function"]}]),  # type: ignore[dict-item]
    ],
)
def test_tools_are_kept_as_openai_has_them_today(tmp_path: Path, field: str, value: Any) -> None:
    assert one(tmp_path, chat(ASKED, **{field: value})).tools == (TOOL,)


def test_what_a_row_says_of_itself_is_kept(tmp_path: Path) -> None:
    row = chat(ASKED, assistant(), id="weather-1", conversation_id="weather", license="MIT", model="m", title="T", split="TRAIN")
    found = one(tmp_path, row | {"created_at": "2026-01-02T03:04:05+02:00"})
    assert (found.name, found.group, found.license) == ("weather-1", "weather", "MIT")
    assert found.meta == {
        "name": "weather-1",
        "format": "openpipe",
        "model": "m",
        "title": "T",
        "split": "TRAIN",
        "time": "2026-01-02T01:04:05Z",
    }


@pytest.mark.parametrize(
    "created, time",
    [(1702666185, "2023-12-15T18:49:45Z"), (1702666185703, "2023-12-15T18:49:45Z"), (10**30, None), (-5, None), ("soon", None)],
)
def test_a_recorded_answer_says_when_and_by_which_model_it_was_given(tmp_path: Path, created: Any, time: str | None) -> None:
    answer = {"choices": [{"message": assistant()}], "created": created, "model": "m-2026"}
    found = one(tmp_path, {"input": chat(ASKED, tools=[TOOL]), "output": answer})
    assert (found.meta["model"], found.meta.get("time"), found.tools) == ("m-2026", time, (TOOL,))


def test_a_collected_line_is_read_back_as_it_was(tmp_path: Path) -> None:
    messages = (
        Message("system", "Be brief."),
        ASKED_MESSAGE,
        Message("assistant", "<think>\nHm.\n</think>\n", 0.5, "recovers", CALLED.tool_calls),
        RESULT,
        Message("assistant", " Rain. \n", 0.0, "interrupted"),
        Message("assistant", ""),
    )
    meta = {"name": "log#branch", "tool_format": "tool", "not_reproduced": ["x"]}
    written = Conversation(messages, "gptme", "log", "private", meta, (TOOL,))
    again = one(tmp_path, written.to_json())
    assert (again.messages, again.tools, again.id, again.group) == (written.messages, written.tools, written.id, "log")
    assert (again.name, again.license) == ("log#branch", "private")
    assert again.meta == {**meta, "format": "openai"}
    assert one(tmp_path, again.to_json()) == again


def test_every_format_once_read_is_read_back_equal(tmp_path: Path) -> None:
    for row, _, _ in FORMATS.values():
        found = one(tmp_path, row)
        again = one(tmp_path, found.to_json())
        assert (again.messages, again.tools, again.name) == (found.messages, found.tools, found.name)
