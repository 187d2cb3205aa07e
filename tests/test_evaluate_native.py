"""Native tool calls in an evaluation: asked for, read off what the model writes, and judged as those of the other formats."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from chats import template_of
from shipped_templates import model_folder, shipped
from test_evaluate_tokens import texts, told
from tiny_models import make_tiny
from tool_chats import LLAMA, MISTRAL, QWEN, TOOLS, call, calling, result

from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Conversation, Message, ToolCall, write_conversations
from mlx_finetune.data.native import with_calls_as_text
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.evaluation.compare import compare
from mlx_finetune.evaluation.generation import Answer, Question, answer_all, questions
from mlx_finetune.evaluation.token_kinds import Told
from mlx_finetune.evaluation.wanted import Wanted
from mlx_finetune.training.run import execute, plan_run

JINJA = {"hermes": QWEN, "llama": LLAMA, "mistral": MISTRAL}
TAGS = {"think": "trl/qwen3_5_think", "xml": "trl/qwen3_5_nothink"}  # as published; the first begins each answer with a thought
PATCH = "<<<<<<< ORIGINAL\nx = 1\n=======\nx = 2\n>>>>>>> UPDATED"
LIMIT = 999


def log(words: str = "") -> list[Message]:
    """A file is written, a command fails, another is tried, the file is patched."""
    return [
        Message("user", "Go."),
        calling(call("call00001", "save", path="é.py", content="x = 1\n"), content=words),
        result("call00001", "Saved to é.py"),
        calling(call("call00002", command="cat x")),
        result("call00002", "Error during execution: no"),
        calling(call("call00003", command="ls -la"), content=words),
        result("call00003", "a"),
        calling(call("call00004", "patch", path="é.py", patch=PATCH)),
        result("call00004", "Patch successfully applied to é.py"),
        Message("assistant", "Done."),
    ]


class Says:
    """A model with an answer to each question."""

    def __init__(self, *answers: list[int]) -> None:
        self.answers = list(answers)

    def generate_all(self, *_: object) -> list[list[int]]:
        return self.answers


def answers(template: ChatTemplate, asked: Sequence[Question], written: Sequence[list[int]]) -> list[Answer]:
    return answer_all(Says(*written), template, asked, LIMIT)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTemplate]:
    found = {name: template_of(tmp_path_factory.mktemp(name), text) for name, text in JINJA.items()}
    for name, published in TAGS.items():
        one = next(one for one in shipped() if one.name == published)
        found[name] = ChatTemplate.load(model_folder(tmp_path_factory.mktemp(name), one.jinja, one.control, one.stops))
    return found


def tokens_of(made: Sequence[Told], question: Question) -> list[int]:
    """What the log has behind the prompt of the question."""
    (found,) = (
        one.example.tokens[turn.start : turn.stop].tolist()
        for one in made
        for turn in one.turns
        if one.example.tokens[: turn.start].tolist() == question.prompt
    )
    return found


@pytest.mark.parametrize("schemas", [True, False])
@pytest.mark.parametrize("name", [*JINJA, *TAGS])
def test_the_log_judged_by_itself_is_right_in_everything(templates: dict[str, ChatTemplate], name: str, schemas: bool) -> None:
    template, messages = templates[name], log("" if name in ("llama", "mistral") else "I look.")
    made = told(messages, template, "tool", TOOLS if schemas else ())
    asked, left_out = questions(made, template, 99, LIMIT)
    assert (len(asked), left_out) == (5, 0)
    found = answers(template, asked, [tokens_of(made, question) for question in asked])
    assert [name for answer in found for name, good in answer.judged.items() if not good] == []
    judged = {question.turn: answer.judged.keys() for question, answer in zip(asked, found, strict=True)}
    assert all({"valid call", "same tool"} <= judged[turn] for turn in (1, 3, 5, 7)) and "valid call" not in judged[9]
    assert "another call after an error" in judged[5] and {"patch applies", "patch well formed"} <= judged[7]
    assert {"shell parses", "today's conventions"} <= judged[3]
    logged = [message.content for message in with_calls_as_text(messages) if message.role == "assistant"]
    text_of = {question.turn: answer.text for question, answer in zip(asked, found, strict=True)}
    assert [text_of[turn] for turn in sorted(text_of)] == [re.sub(r"\(call0000\d\)", "(call_1)", text) for text in logged]


BROKEN = {
    "hermes": '<tool_call>\n{"name": "shell", "arguments": {"command": "l',
    "llama": '{"name": "shell", "parameters": {"command": "ls"}} and more',
    "mistral": '[TOOL_CALLS] [{"name": "shell", "arguments": "ls"}]',
    "xml": "<tool_call>\n<function=shell>\n<parameter=command>\nls\n</tool_call>",
    "think": "<tool_call>\n<function=shell>\n<parameter=command>\nls\n</parameter>\n</function>\n</tool_call>",
}  # of the last all is a thought, which does not end


@pytest.mark.parametrize("name", BROKEN)
def test_what_a_server_would_not_read_as_a_call_is_none(templates: dict[str, ChatTemplate], name: str) -> None:
    template = templates[name]
    asked, _ = questions(told(log(), template, "tool", TOOLS), template, 99, LIMIT)
    (answer,) = answers(template, [one for one in asked if one.turn == 5], [template.prompt_tokens(BROKEN[name])])
    names = ("valid call", "same tool", "another call after an error")
    assert [answer.judged[name] for name in names] == [False] * 3


def test_the_failed_call_made_again_is_not_another_one(templates: dict[str, ChatTemplate]) -> None:
    template = templates["hermes"]
    asked, _ = questions(told(log(), template, "tool", TOOLS), template, 99, LIMIT)
    again = '<tool_call>\n{"name": "shell", "arguments": {"command": "cat x "}}\n</tool_call>'
    (answer,) = answers(template, [one for one in asked if one.turn == 5], [template.prompt_tokens(again)])
    assert answer.text == '@shell(call_1): {"command": "cat x "}'
    assert answer.judged["valid call"] and not answer.judged["another call after an error"]


def test_turns_whose_calls_are_written_in_an_unknown_way_are_left_out_and_counted(tmp_path: Path) -> None:
    template = template_of(tmp_path, QWEN.replace("tool_call>", "call>"))
    asked, left_out = questions(told(log(), template, "tool", TOOLS), template, 99, LIMIT)
    assert ([question.turn for question in asked], left_out) == ([9], 4)


def test_a_call_that_cannot_be_read_back_is_left_out(templates: dict[str, ChatTemplate]) -> None:
    template = templates["xml"]
    messages = [Message("user", "Go."), calling(call("call00001", command="</tool_call>")), result("call00001", "a")]
    asked, left_out = questions(told([*messages, Message("assistant", "So.")], template, "tool"), template, 99, LIMIT)
    assert ([question.turn for question in asked], left_out) == ([3], 1)


def test_a_thought_that_the_template_ends_before_a_call_is_no_part_of_the_call(templates: dict[str, ChatTemplate]) -> None:
    template = templates["think"]
    words = "<think>\nhm\n</think>\n\nI do."
    for said, before in (("", "</think>\n\n"), (words, "m\n</think>\n\nI do.")):
        (one,) = told([Message("user", "Go."), calling(call("call00001", command="ls"), content=said)], template, "tool")
        found = texts(one, template)
        assert found["prose"] == before
        assert found["inside a call"].strip().startswith("<tool_call>\n<function=shell>")


def test_what_a_program_printed_of_a_file_is_no_failure_of_a_native_call(templates: dict[str, ChatTemplate]) -> None:
    shown = "Ran allowlisted command: `cat a.log`\n\n```stdout\nError during execution: no\nTraceback (most recent call last):\n```"
    messages = [Message("user", "Go."), calling(call("call00001", command="cat a.log")), result("call00001", shown)]
    messages.append(Message("assistant", "So."))
    (native,) = told(messages, templates["hermes"], "tool")
    (as_text,) = told(list(with_calls_as_text(messages)), templates["hermes"], "tool")
    assert [turn.after for turn in native.turns] == [turn.after for turn in as_text.turns] == [0, 1]


def test_half_a_character_that_a_model_wrote_stays_escaped_and_what_is_no_json_as_it_is() -> None:
    calls = (ToolCall("a", "f", '{"x": "\\ud83d é"}'), ToolCall("", "g", "no"), ToolCall("c", "h", '{"x": "é"}'))
    (message,) = with_calls_as_text([Message("assistant", "So.\n", tool_calls=calls)])
    assert message.content == 'So.\n@f(a): {"x": "\\ud83d \\u00e9"}\n@g(call): no\n@h(c): {"x": "é"}'


def test_a_model_that_always_makes_the_call_has_a_rate_of_one(tmp_path: Path) -> None:
    template_of(make_tiny("llama", tmp_path / "base", tokenizer=True), QWEN)
    made = calling(call("call00001", command="ls"))
    talks = [Conversation((Message("user", f"{i}?"), made), "gptme", f"log-{i}", "MIT") for i in range(24)]
    write_conversations(tmp_path / "gptme.jsonl", talks)
    settings = {"max_length": 192, "valid_fraction": 0.3, "validation_by": "hash"}
    template = ChatTemplate.load(tmp_path / "base")
    prepare([tmp_path / "gptme.jsonl"], template, make_config(settings, "test"), tmp_path / "dataset", {"model": "m"})
    settings = {"model": str(tmp_path / "base"), "data": str(tmp_path / "dataset"), "out": str(tmp_path / "run"), "engine": "mlx"}
    settings |= {"rank": 8, "alpha": 16, "steps": 40, "batch_size": 4, "gradient_accumulation": 1, "learning_rate": 2e-2}
    settings |= {"eval_every": 40, "save_every": 40, "sample_prompts": 0}
    execute(plan_run(make_config(settings, "test")), lambda done, steps, note: None)
    compare(tmp_path / "run", "latest", wanted=Wanted(generate=3, limit=90))
    generation = json.loads((tmp_path / "run" / "evaluation.json").read_text())["generation"]
    assert (generation["turns"], generation["left_out"], generation["format"]) == (3, 0, "tool")
    rates = {rate["name"]: rate for rate in generation["rates"]}
    names = ("valid call", "same tool", "shell parses", "fence closed", "stops by itself")
    assert {name: (rates[name]["tuned"], rates[name]["of_tuned"]) for name in names} == dict.fromkeys(names, (1, 3))
    assert rates["valid call"]["base"] == 0
    assert {sample["tuned"] for sample in generation["samples"]} == {'@shell(call_1): {"command": "ls"}'}
    assert {sample["logged"] for sample in generation["samples"]} == {'@shell(call00001): {"command": "ls"}'}
