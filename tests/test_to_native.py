"""Logs of gptme's format tool become native messages as gptme itself sends them."""

import json
from pathlib import Path

import pytest
from log_rows import flat, said

from mlx_finetune.data.conversation import Message, ToolCall
from mlx_finetune.data.tool_calls import to_native


def test_native_messages_are_those_of_openais_format() -> None:
    log = [
        said("system", "You are gptme"),
        said("user", "hi"),
        said("assistant", 'I look.\n@shell(a): {"command": "echo é"}\n@shell(b): {}'),
        said("system", "time is short"),
        said("system", "é", "a"),
        said("system", "more", "a"),
        said("system", "b", "b"),
        said("assistant", '\n@complete(c): {"x": "y",}'),
        said("system", "lost", "z"),
        said("user", "stop"),
    ]
    assert flat(to_native(log)) == [
        ("system", "You are gptme", [], ""),
        ("user", "hi", [], ""),
        ("assistant", "I look.\n", [("a", "shell", '{"command": "echo \\u00e9"}'), ("b", "shell", "{}")], ""),
        ("tool", "é\n\nmore", [], "a"),
        ("tool", "b", [], "b"),
        ("system", "time is short", [], ""),
        ("assistant", "", [("c", "complete", '{"x": "y"}')], ""),
        ("user", "lost", [], ""),  # no turn made that call
        ("user", "stop", [], ""),  # the call c has no result: none is made up
    ]


def test_native_messages_keep_their_weights_and_what_is_native_stays_native() -> None:
    log = [Message("assistant", "@shell(a): {}", 0.0, "declined"), said("system", "no", "a")]
    once = to_native(log)
    assert (once[0].weight, once[0].reason) == (0.0, "declined")
    assert to_native(once) == once
    assert once[0].tool_calls == (ToolCall("a", "shell", "{}"),)


def test_text_around_native_calls_is_cut_as_gptme_cuts_it() -> None:
    def sent(text: str) -> str:
        return to_native([said("assistant", text)])[0].content

    assert sent("Just text.\n") == "Just text.\n"
    assert sent("A\n@shell(a): {} rest of the line\nB\n@shell(b): {}\nafter") == "A\nB\n"
    assert sent("A\n```shell\nls\n```\nafter") == "A\n```shell\nls\n```\n"  # a block that runs ends what is sent
    assert sent("A\n```python\nls\n```\nafter") == "A\n```python\nls\n```\nafter"


def test_names_of_mcp_tools_are_sent_as_openai_allows_them() -> None:
    (message,) = to_native([said("assistant", "@my server.look(a): {}")])
    assert message.tool_calls[0].name == "my_server_look_b7bf8cdaabc2"


@pytest.mark.parametrize("name", ["tool__2026-06-18-climbing-orange-robot", "tool_parallel_calls__2026-07-16-swimming-happy-seal"])
def test_a_tool_format_log_becomes_the_recorded_requests_message_for_message(shared: Path, name: str) -> None:
    """From the first user message on; what stands before is the reader's (sources/gptme.py), and no call is in it."""
    lines = (shared / "data" / "gptme-logs" / name.split("__")[1] / "conversation.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in lines.splitlines()]
    log = [said(row["role"], row["content"], row.get("call_id") or "") for row in rows]
    log = log[[message.role for message in log].index("user") :]
    turns = [place for place, message in enumerate(log) if message.role == "assistant"]
    requests = json.loads((shared / "data" / "gptme-requests" / f"{name}.json").read_text(encoding="utf-8"))
    assert len(requests) == len(turns)
    for request, turn in zip(requests, turns, strict=True):
        messages = request["body"]["messages"]
        first = [message["role"] for message in messages].index("user")
        sent = [
            (
                message["role"],
                "".join(part["text"] for part in message.get("content") or ()),
                [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or ()],
                message.get("tool_call_id", ""),
            )
            for message in messages[first:]
        ]
        assert flat(to_native(log[:turn])) == sent
