"""Small chat templates after real ones, conversations of everything that breaks masks, and what of a chat is learned."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import CHATML, tiny_tokenizer

from mlx_finetune.data.conversation import ROLES, Conversation, Message
from mlx_finetune.data.template import ChatTemplate

PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
LLAMA3 = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '<|endoftext|>\n\n' + m['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|endoftext|>\n\n' }}{% endif %}"
)
# As zephyr-7b-beta: roles are plain text, tool messages vanish.
ZEPHYR = (
    "{% for m in messages %}{% if m['role'] != 'tool' %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SPACED = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
RAISES = "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}{{ raise_exception('system\nfirst') }}"
RAISES += "{% endif %}{% endfor %}" + CHATML
NO_POLICY = RAISES.replace("and not loop.first", "and not loop.first or m['role'] == 'tool' or '<system>' in m['content']")
NO_END = CHATML.replace("<|im_end|>", "")
END_ONLY_LAST = NO_END + "{% if not add_generation_prompt %}{{ '<|im_end|>' }}{% endif %}"


def chatml_with(content: str) -> str:
    """ChatML that writes `content` (a Jinja expression on `message`) in place of the content."""
    return CHATML.replace("message['content']", f"({content})")


DROPS_SYSTEM = chatml_with("'' if message['role'] == 'system' and not loop.first else message['content']")
STRIPS_THINKING = chatml_with(
    "message['content'] if loop.last or message['role'] != 'assistant' else message['content'].split('</think>')[-1].lstrip()"
)
REPEATS_SYSTEM = chatml_with("messages[0]['content'] + message['content'] if message['role'] == 'user' else message['content']")
UPPER = chatml_with("message['content'] | upper")
ESCAPES = chatml_with("message['content'] | replace('\"', '”') | replace('、', ',')")
# As Qwen2.5: a system prompt of its own where there is none.
DEFAULT_PROMPT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n' + 'You are the answer. ' * 20 }}{% endif %}" + CHATML
)
SYSTEM_LAST = (
    "{% for message in messages if message['role'] != 'system' %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% for message in messages if message['role'] == 'system' %}{{ message['content'] + '\n' }}{% endfor %}"
) + PROMPT
TEMPLATES: Mapping[str, str] = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "zephyr": ZEPHYR,
    "spaced": SPACED,
    "raises": RAISES,
    "drops system": DROPS_SYSTEM,
    "strips thinking": STRIPS_THINKING,
    "upper": UPPER,
    "escapes": ESCAPES,
    "system last": SYSTEM_LAST,
}

PIECES = (
    "the answer", "def f(x):\n    return [x, 'y', \"z\"]\n", '"quoted"', "it's", "👩‍🔬🇩🇪", "é\u0301ü", "你好、世界", "שלום", "...",
    "`", "   ", "\t", "\n", "\n\n\n", "\r\n", "\r", "a\r\nb", "<think>\nwhy\n</think>\n\n", "</think>", "<tool_call>", "[INST]",
    "</s>", "{{ x }}", "{% if %}", "<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<|user|>", "\x00", "\x1f", "\u200b",
    "\u2028", "\ufeff", "\u00a0", "\ue000", "\U000f0041", "\U0010fffd", "0123456789", "$ ls -la /home; echo $?",
    "#", "-", "&lt;", "\\n", "assistant", "user",
    "A", "",
)  # fmt: skip
BEYOND = ("\U00050041", "\U000dfffd")  # unassigned code points, where provenance is marked


def template_of(folder: Path, jinja: str, eos: str | None = None, **changes: Any) -> ChatTemplate:
    """A chat template on the tiny tokenizer (`changes`: its parts), saved and loaded as a model's would be."""
    tokenizer = tiny_tokenizer()
    if eos:
        tokenizer.add_special_tokens({"eos_token": eos})
    for part, value in changes.items():
        setattr(tokenizer.backend_tokenizer, part, value)
    tokenizer.chat_template = jinja
    tokenizer.save_pretrained(folder)
    return ChatTemplate.load(folder)


def chat(*contents: str, first: str = "user") -> list[Message]:
    """User and assistant in turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [Message(roles[i % 2], content) for i, content in enumerate(contents)]  # type: ignore[arg-type]


def random_chat(random: np.random.Generator, beyond: float = 0.0) -> list[Message]:
    """Up to nine messages of any role and any text; with chance `beyond`, one holds a character that is always refused."""
    messages = []
    for _ in range(random.integers(1, 10)):
        role = str(random.choice(ROLES, p=(0.15, 0.35, 0.4, 0.1)))
        content = "".join(random.choice(PIECES, random.integers(0, 5)).tolist())
        weight = float(random.choice((1.0, 0.0, 0.5), p=(0.7, 0.2, 0.1)))
        messages.append(Message(role, content, weight))  # type: ignore[arg-type]
    if random.random() < beyond:
        messages.append(Message("user", "x" + str(random.choice(BEYOND))))
    return messages


def conversation_of(messages: Sequence[Message], group: str = "g", source: str = "gptme") -> Conversation:
    return Conversation(tuple(messages), source, group, "private")


def to_learn(messages: Sequence[Message]) -> list[tuple[int, str, float]]:
    """Place, text and weight of each assistant message that says something and is not context only."""
    turns = [(i, m.content.strip(), m.weight) for i, m in enumerate(messages) if m.role == "assistant" and m.weight > 0]
    return [turn for turn in turns if turn[1]]
