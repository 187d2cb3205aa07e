"""Rows for a chat template: what a server hands on; and each text of a call is looked for as often as the call holds it."""

import pytest
from tool_chats import call, calling, result

from mlx_finetune.data.conversation import Message, ToolCall
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.rows import arguments_of, check_written, rows_of, texts_of


def test_a_row_holds_calls_decoded_and_names_a_call_only_where_there_is_one() -> None:
    messages = [Message("user", "go"), calling(call("c1", command="ls", times=2), content="Look."), result("c1", "a.txt")]
    function = {"name": "shell", "arguments": {"command": "ls", "times": 2}}
    assert rows_of(messages) == [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "Look.", "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "content": "a.txt", "tool_call_id": "c1"},
    ]


@pytest.mark.parametrize("arguments", ["[1]", "3", "null", '"ls"'])
def test_arguments_that_are_no_object_are_refused_and_none_at_all_are_no_text(arguments: str) -> None:
    assert arguments_of(ToolCall("c", "f", "")) == {}
    with pytest.raises(Refused, match="no JSON object"):
        arguments_of(ToolCall("c", "f", arguments))


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("ls", "ls"),
        ('say "é"\n', 'say "é"\n'),
        ('say "é"\n', 'say \\"é\\"\\n'),
        ('say "é"\n', 'say \\"\\u00e9\\"\\n'),
        (True, "true"),
        (True, "True"),
        (False, "False"),
        (None, "None"),
        (0.5, "0.5"),
        ([1, {"deep": ["x"]}], "1 deep x"),
    ],
)
def test_an_argument_stands_there_as_it_is_or_as_json_or_jinja_writes_it(value: object, written: str) -> None:
    calls = [call("c", "f", key=value)]
    check_written(calls, f"f key {written}")
    for other in (f"key {written}", f"f {written}", f"f key {written[:-1]}"):
        with pytest.raises(Refused, match="drops a tool call"):
            check_written(calls, other)


def test_what_two_calls_hold_stands_there_twice() -> None:
    calls = [call("c", "run", path="a.py"), call("d", "run", path="b.py")]
    check_written(calls, "run path a.py run path b.py, and more of it: run path")
    for dropped in ("run path a.py b.py path", "run path a.py run b.py", "run path a.py run path"):
        with pytest.raises(Refused, match="drops a tool call"):
            check_written(calls, dropped)


def test_all_texts_of_calls_and_schemas_are_looked_at() -> None:
    tools = [{"function": {"name": "f", "enum": ["x", 3, True, None]}}]
    found = sorted(texts_of([call("c1", "g", path=["p", {"q": "r"}])], tools))
    assert found == sorted(["c1", "g", "path", "p", "q", "r", "function", "name", "f", "enum", "x", "3", "true", "null"])
    assert list(texts_of([], [])) == []
