"""Rows of chat files that break their format, teach nothing or are no chats: each is named with its field, nothing crashes."""

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_rows import ASKED, BARE, CALL, FORMATS, TOOL, TURNS, assistant, chat, items_of, one, parts

from mlx_finetune.data.conversation import Conversation
from mlx_finetune.data.sources import BadLine, Rejected, gather
from mlx_finetune.data.sources.chat_formats import read
from mlx_finetune.errors import UserError

CALLS = [assistant(content="", tool_calls=[{**CALL, "id": ""}, {**CALL, "id": ""}])]
READ_NOT: dict[str, tuple[Any, str]] = {
    "messages is no list": ({"messages": 7}, "messages: a number is not a list"),
    "messages is text": ({"messages": "Hi"}, "messages: not JSON, or cut off: Expecting value, column 1"),
    "a message is text": (chat(ASKED, "Hi"), "messages[1]: text is not an object with role and content"),
    "no role": (chat({"content": "Hi"}), "messages[0].role: nothing is not one of system, user, assistant, tool"),
    "unknown role": (chat({"role": "narrator", "content": "Hi"}), "messages[0].role: 'narrator' is not one of"),
    "unknown from": ({"conversations": [{"from": "god", "value": "Hi"}]}, "conversations[0].from: 'god' is not one of"),
    "no value": ({"conversations": [{"from": "gpt"}]}, "conversations[0].value: nothing, and no tool call either"),
    "no content": (chat(ASKED, {"role": "assistant"}), "messages[1].content: nothing, and no tool call either"),
    "content is a number": (chat({**ASKED, "content": 5}), "messages[0].content: a number is not text"),
    "a part is a number": (chat({**ASKED, "content": [5]}), "messages[0].content[0]: a number is no part of a message"),
    "a part without text": (chat({**ASKED, "content": [{"type": "text"}]}), "messages[0].content[0].text: nothing is not text"),
    "weight is text": (chat(assistant(weight="1")), "messages[0].weight: '1' is not a number that is 0 or from 0.001 to 1000"),
    "weight is true": (chat(assistant(weight=True)), "messages[0].weight: true or false is not a number"),
    "weight is negative": (chat(assistant(weight=-1)), "messages[0].weight: -1 is not a number that is 0"),
    "weight is large": (chat(assistant(weight=1e9)), "messages[0].weight: 1000000000.0 is not a number that is 0"),
    "weight is huge": (chat(assistant(weight=10**400)), f"messages[0].weight: 1{'0' * 43}… is not a number that is 0"),
    "tool_calls is text": (chat(assistant(tool_calls="x")), "messages[0].tool_calls: not JSON"),
    "a call is text": (
        chat(assistant(tool_calls=["x"])),
        "messages[0].tool_calls[0]: text is not an object with name and arguments",
    ),
    "a call without name": (
        chat(assistant(tool_calls=[{"function": {"arguments": "{}"}}])),
        "messages[0].tool_calls[0].function.name: nothing is no name",
    ),
    "arguments cut off": (
        chat(assistant(tool_calls=[{"function": {"name": "f", "arguments": '{"a": '}}])),
        "messages[0].tool_calls[0].function.arguments: not JSON, or cut off: Expecting value, column 7",
    ),
    "arguments are a list": (
        chat(assistant(function_call={"name": "f", "arguments": "[1]"})),
        "messages[0].function_call.arguments: not a JSON object",
    ),
    "arguments with NaN": (
        chat(assistant(function_call={"name": "f", "arguments": '{"a": NaN}'})),
        "messages[0].function_call.arguments: NaN is not JSON",
    ),
    "a function_call that is none": (
        {"conversations": [{"from": "function_call", "value": "weather(Oslo)"}]},
        "conversations[0].value: not JSON, or cut off",
    ),
    "tools is text": (chat(ASKED, tools="weather"), "tools: not JSON"),
    "a tool is text": (chat(ASKED, tools=["weather"]), "tools[0]: text is not an object"),
    "a recorded tool is text": ({"input": chat(ASKED, tools=["x"])}, "input.tools[0]: text is not an object"),
    "a recorded message without role": (
        {"input": chat(ASKED), "output": {"choices": [{"message": {"content": "Hi"}}]}},
        "output.choices[0].message.role: nothing is not one of",
    ),
    "system is a number": (chat(ASKED, system=5), "system.content: a number is not text"),
    "instruction is a list": ({"instruction": [], "output": "3"}, "instruction: a list is not text"),
    "input is a number": ({"instruction": "Add.", "input": 5, "output": "3"}, "input: a number is not text"),
    "output is a number": ({"instruction": "Add.", "output": 3}, "output: a number is not text"),
    "history is no pair": ({"instruction": "Hi", "output": "Hello", "history": [["Hi"]]}, "history[0]: not a pair"),
    "prompt is a number": ({"prompt": 5, "completion": "Hi"}, "prompt: a number is not a list"),
    "completion without role": ({"prompt": "Hi", "completion": [{"content": "Hi"}]}, "completion[0].role: nothing is not one of"),
    "text is a list": ({"text": ["Hi"]}, "text: a list is not text"),
    "an unknown speaker": (
        {"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>god\nHi"},
        "text, turn 3.role: 'god' is not one of",
    ),
}
LEARNED_NOT: dict[str, tuple[Any, str]] = {
    "an image": (
        chat(ASKED, {"role": "user", "content": [*parts("See"), {"type": "image_url", "image_url": {"url": "x"}}]}),
        "messages[1].content[1]: image_url: only text can be learned",
    ),
    "no messages": ({"messages": []}, "no messages"),
    "a result without a call": (
        chat(ASKED, {**BARE, "tool_call_id": "c9"}),
        "messages[1].tool_call_id: 'c9': answers no call before it",
    ),
    "a second result": (chat(*TURNS, TURNS[2]), "messages[3].tool_call_id: 'c1': answers no call before it"),
    "a result before its call": (chat(TURNS[2], *TURNS[:2]), "messages[0].tool_call_id: 'c1': answers no call before it"),
    "one result for two calls": (
        chat(ASKED, *CALLS, BARE),
        "messages[2].tool_call_id: nothing, and 2 calls wait: it cannot be told which is meant",
    ),
    "no answer recorded": ({"input": chat(ASKED), "output": {"error": "timeout"}}, "output.choices: no answer was recorded"),
    "an answer cut off": (
        {"request": chat(ASKED), "response": {"choices": [{"finish_reason": "length", "message": assistant()}]}},
        "response.choices[0].finish_reason: length: the answer is cut off",
    ),
    "a preference": ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, "chosen: a preference, which is not learned"),
    "a bad answer": ({"prompt": "Hi", "completion": "No", "label": False}, "label: false: the answer is marked as a bad one"),
    "a failed answer": (chat(ASKED, assistant(), judgement="FAIL"), 'judgement: "FAIL": the answer is marked as a bad one'),
    "OpenPipe's test split": (chat(ASKED, assistant(), split="TEST"), "split: 'TEST': a test split, such as OpenPipe's, is never"),
    "a test split of any format": ({"prompt": "Hi", "completion": "Hello", "split": "test"}, "split: 'test': a test split"),
    "a test split in the metadata": (chat(ASKED, assistant(), metadata={"split": "test"}), "metadata.split: 'test': a test split"),
    "a test split in metadata that is text": (chat(ASKED, metadata='{"split": "Test"}'), "metadata.split: 'Test': a test split"),
    "a test split in a recorded request": (
        {"input": chat(ASKED, metadata={"split": "TEST"}), "output": {"choices": [{"message": assistant()}]}},
        "input.metadata.split: 'TEST': a test split",
    ),
    "no question": ({"prompt": " ", "completion": "Hello"}, "prompt: empty"),
    "no output": ({"instruction": "Hi", "output": ""}, "output: empty"),
    "free text": ({"text": "The sky is blue."}, "text: free text without speakers"),
    "text of one speaker": ({"text": "User: I said so.\nUser: And again."}, "text: free text without speakers"),
    "prose about markup": ({"text": "ChatML begins with <|im_start|>user and <|im_start|>assistant."}, "text: free text"),
}


@pytest.mark.parametrize("row, reason", READ_NOT.values(), ids=READ_NOT)
def test_a_row_that_breaks_its_format_is_named_with_line_and_field(tmp_path: Path, row: Any, reason: str) -> None:
    good, bad = items_of(tmp_path, chat(ASKED, assistant()), row)
    assert isinstance(good, Conversation)
    assert isinstance(bad, BadLine) and (bad.path.name, bad.line) == ("chats.jsonl", 2)
    assert bad.reason.startswith(reason)


@pytest.mark.parametrize("row, reason", LEARNED_NOT.values(), ids=LEARNED_NOT)
def test_a_row_from_which_nothing_can_be_learned_is_rejected_with_the_field(tmp_path: Path, row: Any, reason: str) -> None:
    found = one(tmp_path, row)
    assert isinstance(found, Rejected) and (found.id, found.source) == ("chats.jsonl:1", "chat")
    assert found.reason.startswith(reason)


def test_a_reason_that_is_counted_is_the_same_wherever_the_row_breaks_and_whatever_stands_there(tmp_path: Path) -> None:
    image = {"role": "user", "content": [*parts("See"), {"type": "image_url"}]}
    rows = [
        *(chat(*[ASKED] * i, {**BARE, "tool_call_id": f"call_{i}"}, assistant()) for i in range(3)),
        *(chat(ASKED, assistant(content="", tool_calls=[{**CALL, "id": ""}] * i), BARE) for i in (2, 3)),
        *(chat(*[ASKED] * i, image) for i in range(2)),
        *({"instruction": "Hi", "output": "Hello", "history": [["Hi", "Hello"]] * i + [["Hi", ""]]} for i in range(2)),
        *({"input": chat(ASKED), "output": {"choices": choices}} for choices in ([], None)),
        *(chat(ASKED, assistant(), split=split) for split in ("TEST", "test")),
        chat(),
    ]
    found = gather(items_of(tmp_path, *rows))
    assert len(found.rejected) == len(rows)
    assert Counter(one.countable for one in found.rejected) == {
        "tool_call_id: answers no call before it": 3,
        "tool_call_id: it cannot be told which is meant": 2,
        "content: only text can be learned": 2,
        "history: empty": 2,
        "choices: no answer was recorded": 2,
        "split: a test split, such as OpenPipe's, is never learned": 2,
        "no messages": 1,
    }


FOREIGN: dict[str, tuple[Any, str, str]] = {
    "gptme": (
        {"role": "user", "content": "Hi", "timestamp": "2026-01-01"},
        "a message of a gptme log",
        "mlx-finetune collect LOGS",
    ),
    "a message": ({"role": "user", "content": "Hi"}, "one message, not a chat", '{"messages": [...]}'),
    "OpenAssistant tree": (
        {"message_tree_id": "t", "tree_state": "x", "prompt": {"text": "Hi"}},
        "OpenAssistant",
        "--openassistant",
    ),
    "OpenAssistant message": ({"message_id": "m", "role": "prompter", "text": "Hi"}, "OpenAssistant", "--openassistant"),
    "other keys": ({"city": "Oslo", "population": 7}, "no chat: its keys are 'city', 'population'", "messages (OpenAI, OpenPipe)"),
    "a number": (5, "a number is no chat", "known are messages"),
    "messages are null": ({"messages": None, "text": None}, "chats.jsonl:1: messages: nothing", "known are"),
    "conversations are null": ({"id": "x", "conversations": None}, "chats.jsonl:1: conversations: nothing", "known are"),
    "a completion is null": ({"prompt": "q", "completion": None}, "chats.jsonl:1: completion: nothing", "known are"),
    "an output is null": ({"instruction": "q", "input": None, "output": None}, "chats.jsonl:1: output: nothing", "known are"),
    "a prompt is null": ({"prompt": None, "completion": "a"}, "chats.jsonl:1: prompt: nothing", "known are"),
}


@pytest.mark.parametrize("row, message, hint", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_something_else_is_refused_with_what_to_do(tmp_path: Path, row: Any, message: str, hint: str) -> None:
    with pytest.raises(UserError) as refused:
        items_of(tmp_path, row)
    assert message in refused.value.message and "chats.jsonl:1: " in refused.value.message
    assert hint in refused.value.hint


def test_a_foreign_row_among_chats_is_one_bad_line(tmp_path: Path) -> None:
    _, bad, last = items_of(tmp_path, chat(ASKED), FOREIGN["gptme"][0], chat(ASKED))
    assert isinstance(bad, BadLine) and "mlx-finetune collect LOGS" in bad.reason and bad.line == 2
    assert isinstance(last, Conversation)


def random_value(random: np.random.Generator, depth: int = 0) -> Any:
    """Any JSON value, strange ones among them."""
    plain = ["", "x", "user", "assistant", "tool", "{", "[]", '{"a": 1}', "\ud83d", "\0", "c1", None, True, False]
    plain += [
        0,
        1,
        -1,
        0.5,
        1e308,
        10**300,
        "5000 digits",
        "beyond floats",
        float("nan"),
        float("inf"),
        "\u2028",
        "<think>",
        "### Human: a### Assistant: b",
    ]
    kind = random.integers(6)
    if kind < 4 or depth > 2:
        return plain[random.integers(len(plain))]
    values = [random_value(random, depth + 1) for _ in range(random.integers(4))]
    keys = ["role", "content", "type", "text", "function", "name", "arguments", "id", "messages", "from", "value"]
    return values if kind == 4 else {keys[random.integers(len(keys))]: value for value in values}


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [place for key in keys for place in places_in(value[key])]


def test_random_values_in_any_field_never_crash_and_give_conversations_that_can_be_written(tmp_path: Path) -> None:
    random, lines = np.random.default_rng(7), [json.dumps(chat(ASKED))]
    whole = [row for row, _, _ in FORMATS.values()] + [row for row, _ in LEARNED_NOT.values()]
    more = {"id": "i", "created": 5, "tools": [TOOL], "meta": {"name": "n"}, "group": "g", "system": "s"}
    for row in [more | row for row in whole if isinstance(row, dict)]:
        for _ in range(60):
            changed = copy.deepcopy(row)
            for _ in range(random.integers(1, 3)):
                places = places_in(changed)
                container, key = places[random.integers(len(places))]
                container[key] = random_value(random)
            lines.append(json.dumps(changed).replace('"5000 digits"', "7" * 5000).replace('"beyond floats"', "1e999"))
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    found = gather(read(path))
    assert len(found.conversations) + len(found.rejected) + len(found.bad_lines) == len(lines)
    assert min(len(found.conversations), len(found.rejected), len(found.bad_lines)) > 100
    for fault in (*found.rejected, *found.bad_lines):
        assert 0 < len(fault.reason.encode()) < 500
    written = [json.dumps(one.to_json(), ensure_ascii=False, allow_nan=False) for one in found.conversations]
    path.write_bytes("\n".join(written).encode())
    again = gather(read(path))
    assert [one.messages for one in again.conversations] == [one.messages for one in found.conversations]
    assert [one.tools for one in again.conversations] == [one.tools for one in found.conversations]
