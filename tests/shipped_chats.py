"""Shapes of conversations, as letters, and random contents for them: everything that a chat template may trip over."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tool_chats import call

from mlx_finetune.data.conversation import Message

# s system, u user, a assistant, k one that thinks, c one that is only read, h one of half weight, t tool, x a call, r its result
SHAPES: Mapping[str, str] = {
    "plain": "uauaua",
    "with system": "suaua",
    "one turn": "ua",
    "ends on user": "suauau",
    "gptme": "sssuasauuassa",
    "gptme thinking": "sssukskukska",
    "gptme, one log": "sssuasssasaua",
    "same role twice": "suuaauuua",
    "thinking": "sukukua",
    "context only": "sucuahuca",
    "tiny": "suauaua",
    "begins with an answer": "auaua",
    "tool role": "suatatua",
    "native calls": "suxrxrauxra",
    "calls with words": "suyryraua",
}
TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "shell",
            "description": "Runs a command.",
            "parameters": {
                "type": "object",
                "properties": {
                    "command": {"type": "string", "description": "What to run."},
                    "times": {"type": "integer", "description": "How often."},
                    "really": {"type": "boolean", "description": "Whether at all."},
                },
                "required": ["command"],
            },
        },
    },
)
PIECES = (
    "def f(x):\n    return [x, 'y', \"z\"]\n", '"quoted"', "it's", "👩‍🔬🇩🇪", "é\u0301ü", "你好、世界", "שלום", "...", "`", "   ",
    "\t", "\n\n\n", "\r\n", "a\r\nb", "{{ x }}", "{% if y %}", "{# z #}", "\x00", "\u200b", "\u2028", "\ufeff", "\u00a0", "\\n",
    "&lt;", "assistant", "user\n", "system", "$ ls -la; echo $?", "#", "-", "1.", "```shell\nls | wc -l\n```", "<b>bold</b>", "A",
    " ", "", "<details>\n<summary>x</summary>\n", "a < b > c", "[1, 2]", "x[INDEX]", "Human: ", "### Response:", "$", "%s",
    "/think", "/no_think",
)  # fmt: skip
CONTROL = (
    "<think>", "</think>", "<think>\nwhy\n</think>\n\n", "[TOOL_CALLS]", "[INST]", "[/INST]", "<|im_end|>",
    "<|im_start|>assistant\n", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "</s>",
    "<|user|>", "<|endoftext|>", "<eos>", "<|end|>",
    "<|eot_id|>", "<end_of_turn>", "<|channel|>", "<channel|>", "<｜end▁of▁sentence｜>", "<image>", "<system>\n", "</system>",
)  # fmt: skip
TINY = (
    "a", "x", ".", "1", "<", "{", "}", '"', "'", "[", "`", "é", "你", "好的", "👍", "🎉🎉", "\u200d", "!", "-", "…", "。",
    "你好、世界",
)  # fmt: skip
Text = Callable[[], str]


def random_text(random: np.random.Generator, wild: Sequence[str] = ()) -> Text:
    """Texts with a word of their own in each, so that it is known where they come from; `wild` are pieces with a meaning."""
    count = 0

    def text() -> str:
        nonlocal count
        count += 1
        pool = [*PIECES, *wild]
        before, after = ("".join(random.choice(pool, random.integers(0, 4)).tolist()) for _ in range(2))
        return f"{before}word{count:02}{after}"

    return text


def tiny_text(random: np.random.Generator) -> Text:
    """One character, or only such as no letter of ASCII is among."""
    return lambda: str(random.choice(TINY))


def conversation(
    random: np.random.Generator, name: str, wild: Sequence[str] = ()
) -> tuple[list[Message], tuple[dict[str, Any], ...]]:
    """Messages of a shape, and the schemas of its tools; only the contents are random."""
    shape = SHAPES[name]
    text = tiny_text(random) if name == "tiny" else random_text(random, wild)
    empty = 0.05 if wild else 0.0  # a person, or a tool, that says nothing at all
    messages: list[Message] = []
    for place, letter in enumerate(shape):
        if letter == "s":
            messages.append(Message("system", text()))
        elif letter == "u":
            messages.append(Message("user", "" if random.random() < empty else text()))
        elif letter in "akch":
            thought = f"<think>\n{text().strip()}\n</think>\n\n" if letter == "k" else ""
            messages.append(Message("assistant", thought + text(), {"c": 0.0, "h": 0.5}.get(letter, 1.0)))
        elif letter in "xy":
            made = call(f"call{place:05}", command=text(), times=int(random.integers(9)), really=True)
            messages.append(Message("assistant", text() if letter == "y" else "", tool_calls=(made,)))
        else:
            answers = messages[-1].tool_calls[0].id if letter == "r" else ""
            messages.append(Message("tool", text(), tool_call_id=answers))
    return messages, TOOLS if set(shape) & set("xy") else ()
