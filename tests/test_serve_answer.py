"""From the tokens that a model writes to what a client is told: thoughts, calls and stop strings, whole and in pieces."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from chats import template_of
from tiny_models import CHATML
from tool_chats import LLAMA, MISTRAL, QWEN, TOOLS

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.data.written_calls import written_by
from mlx_finetune.serving.answer import Answer, Question, Thought, answer, lead_of
from mlx_finetune.serving.bodies import Reply
from mlx_finetune.serving.opened import Opened

PROMPT = "{{ '<|im_start|>assistant\n' }}{% endif %}"
THINKS = CHATML.replace(PROMPT, "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}")
LEAD = "<|endoftext|>final<|im_start|>"
CHANNEL = (  # a name before each answer, as gpt-oss has one, between control tokens
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}{{ '"
    + LEAD
    + "' }}{% else %}{{ '\n' }}{% endif %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


class Writes:
    """A model that writes one text, token by token."""

    def __init__(self, template: ChatTemplate, text: str) -> None:
        self.template, self.text = template, text

    def generate(self, variant: str, prompt: list[int], limit: int, choose: object) -> Iterator[int]:
        yield from self.template.special.encode(self.text, add_special_tokens=False).ids[:limit]


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTemplate]:
    jinja = {"plain": CHATML, "thinks": THINKS, "channel": CHANNEL, "hermes": QWEN, "llama": LLAMA, "mistral": MISTRAL}
    return {name: template_of(tmp_path_factory.mktemp(name), text) for name, text in jinja.items()}


def told(
    template: ChatTemplate, text: str, stop: tuple[str, ...] = (), limit: int = 1000, tools: bool = True, **how: Any
) -> dict[str, Any]:
    """The message and the reason of a whole answer; that a stream of it says the same is looked at here."""
    prompt = template.prompt([Message("user", "a")]).tolist()
    question = Question("base", prompt, limit, stop=stop, way=written_by(template) if tools else None, tools=TOOLS, **how)
    into = Answer()
    pieces = list(answer(cast(Opened, Writes(template, text)), question, into))
    reply = Reply("m", len(prompt))
    (choice,) = reply.whole(pieces, into)["choices"]
    sent = [event for piece in pieces if piece for event in [reply.piece(piece)]] + list(reply.ending(into, False))
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in sent[:-1]]
    for name in ("content", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas).strip() == (choice["message"].get(name) or "").strip()
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [{k: v for k, v in call.items() if k != "index"} for call in calls] == choice["message"].get("tool_calls", [])
    assert [call["index"] for call in calls] == list(range(len(calls)))
    return choice["message"] | {"reason": choice["finish_reason"], "calls": [_plain(call) for call in calls]}


def _plain(call: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    assert call["type"] == "function" and call["id"]
    return call["function"]["name"], json.loads(call["function"]["arguments"])


WRITTEN = {
    "hermes": '{}<tool_call>\n{{"name": "shell", "arguments": {{"command": "ls"}}}}\n</tool_call>',
    "llama": '{}{{"name": "shell", "parameters": {{"command": "ls"}}}}',
    "mistral": '{}[TOOL_CALLS] [{{"name": "shell", "arguments": {{"command": "ls"}}, "id": "call00007"}}]',
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_call_becomes_a_tool_call_and_words_before_it_stay(templates: dict[str, ChatTemplate], name: str) -> None:
    got = told(templates[name], WRITTEN[name].format(""))
    assert (got["content"], got["calls"], got["reason"]) == (None, [("shell", {"command": "ls"})], "tool_calls")
    assert name != "mistral" or got["tool_calls"][0]["id"] == "call00007"
    beside = told(templates[name], WRITTEN[name].format("I look.\n"))
    if name == "llama":  # which writes nothing beside a call
        assert beside["content"] == WRITTEN[name].format("I look.\n") and beside["reason"] == "stop"
    else:
        assert beside["content"].strip() == "I look." and beside["calls"] == got["calls"]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_call_that_is_cut_off_or_not_asked_for_is_text(templates: dict[str, ChatTemplate], name: str) -> None:
    template, text = templates[name], WRITTEN[name].format("")
    cut = told(template, text, limit=20)
    assert cut["calls"] == [] and cut["reason"] == "length" and text.startswith(cut["content"]) and len(cut["content"]) >= 20
    assert told(template, text, tools=False)["content"] == text


def test_several_calls_are_numbered(templates: dict[str, ChatTemplate]) -> None:
    one = '<tool_call>\n{"name": "save", "arguments": {"path": "a é"}}\n</tool_call>'
    got = told(templates["hermes"], f"{one}\n{one}")
    assert told(templates["hermes"], f"{one}\n{one}", one_call=True)["calls"] == got["calls"][:1]
    assert got["calls"] == [("save", {"path": "a é"})] * 2 and len({call["id"] for call in got["tool_calls"]}) == 2


def test_a_thought_that_the_prompt_began_is_no_part_of_the_answer(templates: dict[str, ChatTemplate]) -> None:
    template = templates["thinks"]
    for text, thought, content in (
        ("I wonder.\n</think>\n\nDone. a < b", "I wonder.", "Done. a < b"),
        ("\n</think>\n\nDone.", None, "Done."),
        ("</think>Done.", None, "Done."),
        ("no end </thi", "no end </thi", ""),
        ("a</think>", "a", ""),
        ("a</think>\n\nb </think> c", "a", "b </think> c"),
    ):
        got = told(template, text)
        assert (got.get("reasoning_content"), got["content"]) == (thought, content), text
    assert told(template, "STOP\n</think>\n\nI STOP here", stop=("STOP",))["content"] == "I "
    assert told(templates["plain"], "<think>\na\n</think>\n\nb")["content"] == "<think>\na\n</think>\n\nb"  # as in gptme's logs


def test_what_the_template_writes_before_each_answer_is_not_told(templates: dict[str, ChatTemplate]) -> None:
    template = templates["channel"]
    assert template.special.decode(lead_of(template), skip_special_tokens=False) == LEAD
    assert lead_of(templates["plain"]) == []
    for text, content in (
        (f"{LEAD}Done.", "Done."),
        ("Done.", "Done."),
        ("<|endoftext|>fine", "fine"),
        ("<|endoftext|>final", "final"),
        (LEAD, ""),
        (f"{LEAD}a{LEAD}b", "afinalb"),
    ):
        assert told(template, text)["content"] == content, text


def test_control_tokens_are_not_told_and_a_text_may_name_them(templates: dict[str, ChatTemplate]) -> None:
    assert told(templates["plain"], "a<|im_start|>b")["content"] == "ab"
    assert isinstance(Thought("a"), str) and told(templates["plain"], "")["content"] == ""


def test_an_answer_as_long_as_the_limit_ended_there(templates: dict[str, ChatTemplate], tmp_path: Path) -> None:
    assert told(templates["plain"], "abc", limit=3)["reason"] == "length"
    assert told(templates["plain"], "abc", limit=4)["reason"] == "stop"
    assert told(templates["plain"], "abcXYdef", stop=("Yd", "X"))["content"] == "abc"
