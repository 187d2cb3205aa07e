"""Rows of chat files as other programs write them, each with the messages that it means."""

import json
from pathlib import Path
from typing import Any

from mlx_finetune.data.conversation import Message, ToolCall
from mlx_finetune.data.sources.chat_formats import read

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
BARE = {"role": "tool", "content": "rain"}
