"""Chat files of other programs: each format becomes our messages, each mistake is named with its field, nothing crashes."""

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_finetune.data.conversation import Conversation, Message, ToolCall
from mlx_finetune.data.sources import BadLine, Rejected, gather
from mlx_finetune.data.sources.chat_formats import read
from mlx_finetune.errors import UserError

ASKED = {"role": "user", "content": "Weather in Oslo?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASKED_MESSAGE, ANSWER = Message("user", "Weather in Oslo?"), Message("assistant", "Rain.")
CALLED = Message("assistant", "", tool_calls=(ToolCall("c1", "weather", '{"city": "Oslo"}'),))
RESULT = Message("tool", "rain", tool_call_id="c1")
TURNS = [
    ASKED,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "rain", "tool_call_id": "c1"},
]


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    """A row of OpenAI's format."""
    return {"messages": list(messages), **more}


def items_of(folder: Path, *rows: Any) -> list[Any]:
    """What a file with these rows gives."""
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(read(path))


def one(folder: Path, row: Any) -> Any:
    """What a file with this row alone gives."""
    (item,) = items_of(folder, row)
    return item


def said(*pairs: tuple[str, str], weight: float = 1.0) -> tuple[Message, ...]:
    """Messages of roles and contents."""
    return tuple(Message(role, content, weight) for role, content in pairs)  # type: ignore[arg-type]


def parts(*texts: str) -> list[dict[str, str]]:
    """Content as a list."""
    return [{"type": "text", "text": text} for text in texts]


def assistant(**fields: Any) -> dict[str, Any]:
    """An assistant's message."""
    return {"role": "assistant", "content": "Rain.", **fields}


HI = said(("user", "Hi"), ("assistant", "Hello"))
WITH_SYSTEM = said(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))
CHATML_SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
FORMATS: dict[str, tuple[Any, str, tuple[Message, ...]]] = {
    "messages": (chat(ASKED, assistant()), "openai", (ASKED_MESSAGE, ANSWER)),
    "a list of messages": ([ASKED, assistant()], "openai", (ASKED_MESSAGE, ANSWER)),
    "messages as JSON text": ({"messages": json.dumps([ASKED, assistant()])}, "openai", (ASKED_MESSAGE, ANSWER)),
    "messages as columns": ({"messages": {"role": ["user"], "content": ["Hi"]}}, "openai", HI[:1]),
    "content in parts": (chat({**ASKED, "content": parts("Weather ", "in Oslo?")}), "openai", (ASKED_MESSAGE,)),
    "developer": (chat({"role": "developer", "content": "Be brief."}, ASKED), "openai", (WITH_SYSTEM[0], ASKED_MESSAGE)),
    "system column": (chat(ASKED, system="Be brief."), "openai", (WITH_SYSTEM[0], ASKED_MESSAGE)),
    "tool calls": (chat(*TURNS, assistant()), "openai", (ASKED_MESSAGE, CALLED, RESULT, ANSWER)),
    "one role twice": (chat(ASKED, ASKED, assistant(), assistant()), "openai", (ASKED_MESSAGE,) * 2 + (ANSWER,) * 2),
    "refusal": (chat(ASKED, assistant(content=None, refusal="No.")), "openai", (ASKED_MESSAGE, Message("assistant", "No."))),
    "reasoning": (
        chat(ASKED, assistant(reasoning_content="Hm.\n")),
        "openai",
        (ASKED_MESSAGE, Message("assistant", "<think>\nHm.\n</think>\nRain.")),
    ),
    "weights": (
        chat(ASKED, assistant(weight=0), assistant(weight=1), assistant(weight=2.5), assistant(weight=None)),
        "openai",
        (ASKED_MESSAGE, *(Message("assistant", "Rain.", weight) for weight in (0.0, 1.0, 2.5, 1.0))),
    ),
    "function_call and role function": (
        chat(
            ASKED,
            assistant(content=None, function_call={"name": "weather", "arguments": '{"city": "Oslo"}'}),
            {"role": "function", "name": "weather", "content": "rain"},
        ),
        "openai",
        (
            ASKED_MESSAGE,
            Message("assistant", "", tool_calls=(ToolCall("call_1", "weather", '{"city": "Oslo"}'),)),
            Message("tool", "rain", tool_call_id="call_1"),
        ),
    ),
    "OpenPipe's data set": (
        chat(ASKED, assistant(), split="TRAIN", rejected_message=assistant(content="Sun."), metadata={}),
        "openpipe",
        (ASKED_MESSAGE, ANSWER),
    ),
    "OpenPipe's log": (
        {"input": {"model": "m", "messages": [ASKED]}, "output": {"choices": [{"message": assistant()}]}, "tags": {}},
        "openpipe",
        (ASKED_MESSAGE, ANSWER),
    ),
    "OpenPipe's own columns, as JSON text": (
        {"reqPayload": json.dumps({"messages": [ASKED]}), "respPayload": json.dumps({"choices": [{"message": assistant()}]})},
        "openpipe",
        (ASKED_MESSAGE, ANSWER),
    ),
    "request and response": (
        {"request": {"messages": [ASKED]}, "response": {"choices": [{"finish_reason": "stop", "message": assistant()}]}},
        "openpipe",
        (ASKED_MESSAGE, ANSWER),
    ),
    "a recorded request alone": ({"path": "/v1", "body": {"messages": [ASKED, assistant()]}}, "openpipe", (ASKED_MESSAGE, ANSWER)),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "sharegpt", HI),
    "ShareGPT with a system column": (
        {
            "conversations": [{"from": "user", "value": "Hi"}, {"from": "bing", "value": "Hello"}],
            "system": "Be brief.",
            "tools": "",
        },
        "sharegpt",
        WITH_SYSTEM,
    ),
    "ShareGPT with role and content": ({"conversations": [ASKED, assistant()]}, "sharegpt", (ASKED_MESSAGE, ANSWER)),
    "ShareGPT with calls": (
        {
            "conversations": [
                {"from": "human", "value": "Weather in Oslo?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Ås"}}'},
                {"from": "observation", "value": "rain"},
            ],
            "tools": '[{"name": "weather"}]',
        },
        "sharegpt",
        (
            ASKED_MESSAGE,
            Message("assistant", "", tool_calls=(ToolCall("call_1", "weather", '{"city": "Ås"}'),)),
            Message("tool", "rain", tool_call_id="call_1"),
        ),
    ),
    "ShareGPT with calls in the text": (
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "<tool_call>\n{}\n</tool_call>"},
                {"from": "tool", "value": "rain"},
            ]
        },
        "sharegpt",
        said(("user", "Hi"), ("assistant", "<tool_call>\n{}\n</tool_call>"), ("tool", "rain")),
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        "alpaca",
        said(("user", "Add.\n1 and 2"), ("assistant", "3")),
    ),
    "Alpaca without input": ({"instruction": "Hi", "input": "", "output": "Hello", "text": "Below is ..."}, "alpaca", HI),
    "Alpaca with history": (
        {"instruction": "Hi", "input": None, "output": "Hello", "system": "Be brief.", "history": [["Hi", "Hello"]]},
        "alpaca",
        (*WITH_SYSTEM, *HI),
    ),
    "Dolly": ({"instruction": "Hi", "context": "", "response": "Hello", "category": "x"}, "alpaca", HI),
    "prompt and completion": ({"prompt": "Hi", "completion": " Hello"}, "completion", HI),
    "an indented completion": (
        {"prompt": "Hi", "completion": "    return"},
        "completion",
        said(("user", "Hi"), ("assistant", "    return")),
    ),
    "question and response": ({"system_prompt": "Be brief.", "question": "Hi", "response": "Hello"}, "completion", WITH_SYSTEM),
    "input and output": ({"input": "Hi", "output": "Hello"}, "completion", HI),
    "completion in messages": (
        {"prompt": [ASKED, assistant(), ASKED], "completion": [assistant()]},
        "completion",
        (ASKED_MESSAGE, Message("assistant", "Rain.", 0.0, "part of the prompt"), ASKED_MESSAGE, ANSWER),
    ),
    "input in messages, output one message": (
        {"input": [ASKED, assistant(), ASKED], "output": assistant(tool_calls=[CALL])},
        "completion",
        (
            ASKED_MESSAGE,
            Message("assistant", "Rain.", 0.0, "part of the prompt"),
            ASKED_MESSAGE,
            Message("assistant", "Rain.", tool_calls=CALLED.tool_calls),
        ),
    ),
    "a request and one message": ({"input": chat(ASKED), "output": assistant()}, "openpipe", (ASKED_MESSAGE, ANSWER)),
    "prompt in messages, completion in text": ({"prompt": [ASKED], "completion": "Rain."}, "completion", (ASKED_MESSAGE, ANSWER)),
    "a rendered prompt": (
        {
            "prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n",
            "completion": "Hello<|im_end|>",
        },
        "completion",
        (HI[0], Message("assistant", "Ho", 0.0, "part of the prompt"), *HI),
    ),
    "ChatML": ({"text": f"{CHATML_SYSTEM}{CHATML}"}, "text", WITH_SYSTEM),
    "ChatML with a generation prompt": ({"text": f"{CHATML}<|im_start|>assistant\n"}, "text", HI),
    "Llama 3": (
        {
            "text": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        },
        "text",
        HI,
    ),
    "Llama 2": ({"text": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s>"}, "text", WITH_SYSTEM),
    "Gemma": ({"text": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"}, "text", HI),
    "Zephyr": ({"text": "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>"}, "text", WITH_SYSTEM),
    "Guanaco": ({"text": "### Human: Hi### Assistant: Hello"}, "text", HI),
    "Alpaca, rendered": (
        {"text": "Be brief.\n\n### Instruction:\nHi\n\n### Input:\nyou\n\n### Response:\nHello"},
        "text",
        said(("system", "Be brief."), ("user", "Hi\nyou"), ("assistant", "Hello")),
    ),
    "a transcript": ({"text": "\n\nHuman: Hi\n\nAssistant: Hello"}, "text", HI),
}


@pytest.mark.parametrize("row, shape, messages", FORMATS.values(), ids=FORMATS)
def test_a_row_of_each_format_becomes_its_messages(tmp_path: Path, row: Any, shape: str, messages: tuple[Message, ...]) -> None:
    found = one(tmp_path, row)
    assert isinstance(found, Conversation), found
    assert found.messages == messages
    assert (found.source, found.meta["format"], found.license) == ("chat", shape, "unknown")
    assert found.name == found.group == "chats.jsonl:1"


CALLS = [assistant(content="", tool_calls=[{**CALL, "id": ""}, {**CALL, "id": ""}])]
BARE = {"role": "tool", "content": "rain"}
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
