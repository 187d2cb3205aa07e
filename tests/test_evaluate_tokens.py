"""Each learned token is of one kind, and the interval of a difference holds the truth as often as it says."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from shipped_chats import CONTROL, SHAPES, conversation
from shipped_templates import model_folder, shipped
from tool_chats import call, calling, result

from mlx_finetune.data.conversation import Conversation, Message, conversation_of
from mlx_finetune.data.examples import make_examples
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.bootstrap import compare_means, sums_of
from mlx_finetune.evaluation.generation import answer_all, questions, spread
from mlx_finetune.evaluation.token_kinds import AFTER, KINDS, Told, tell


def told(messages: list[Message], template: ChatTemplate, tool_format: str = "markdown", tools=()) -> list[Told]:
    """As `prepare` and `evaluate` make them of one conversation."""
    made = make_examples(Conversation(tuple(messages), "gptme", "g", "none", {}, tuple(tools)), template, 10**6)
    rows = [conversation_of(json.loads(line), "test") for line in made.lines]
    return [tell(e, row.messages, template, tool_format, "test") for e, row in zip(made.examples, rows, strict=True)]


def texts(one: Told, template: ChatTemplate) -> dict[str, str]:
    """What the tokens of each kind say together."""
    pieces = template.pieces(one.example.tokens.tolist())
    return {name: "".join(p for p, k in zip(pieces, one.kinds, strict=True) if k == i) for i, name in enumerate(KINDS)}


@pytest.fixture(scope="module")
def template(tiny_llama: Path) -> ChatTemplate:
    return ChatTemplate.load(tiny_llama)


def test_prose_calls_first_tokens_and_stops_are_told_apart(template) -> None:
    turns = [Message("user", "Go."), Message("assistant", "I look.\n\n```shell\nls\n```"), Message("system", "Ran command: `ls`")]
    (one,) = told([*turns, Message("assistant", "Zwei.")], template)
    assert texts(one, template) == {
        "prose": " look.\n\nwei.",
        "inside a call": "```shell\nls\n```",
        "first of a turn": "IZ",
        "stop": "<|im_end|><|im_end|>",
    }


def test_the_kind_of_a_turn_is_what_was_read_before_it(template) -> None:
    log = [Message("user", "Go.")]
    for answer in ("Ran command: `ls`\n\nReturn code: 1", "Ran command: `ls -a`\n\n`x`", "Error during execution: no"):
        log += [Message("assistant", f"```shell\n{answer[12:20]}\n```"), Message("system", answer)]
    (one,) = told([*log, Message("assistant", "So.")], template)
    assert [AFTER[turn.after] for turn in one.turns] == ["first", "after an error", "after success", "after an error"]
    assert Counter(one.after[one.kinds == 3].tolist()) == {0: 1, 1: 1, 2: 2}


def test_xml_and_native_calls_are_calls(template) -> None:
    xml = "So.\n<tool-use>\n<shell>\nls\n</shell>\n</tool-use>"
    (one,) = told([Message("user", "Go."), Message("assistant", xml)], template, "xml")
    assert texts(one, template)["inside a call"] == "<shell>\nls\n</shell>"
    native = '@shell(call_1): {"command": "ls"}'
    (one,) = told([Message("user", "Go."), Message("assistant", f"So.\n{native}")], template, "tool")
    assert texts(one, template)["inside a call"].strip() == native


def test_what_a_template_writes_of_native_tool_calls_is_a_call(tmp_path: Path) -> None:
    hermes = next(one for one in shipped() if one.name == "trl/qwen2_5")
    template = ChatTemplate.load(model_folder(tmp_path, hermes.jinja, hermes.control, hermes.stops))
    log = [
        Message("user", "Go."),
        calling(call("a", command="ls"), content="I look."),
        result("a", "x"),
        Message("assistant", "Done."),
    ]
    found = [texts(one, template) for one in told(log, template, "tool")]
    inside = "".join(each["inside a call"] for each in found)
    assert "<tool_call>" in inside and '"ls"' in inside and "look" not in inside and "one" not in inside


XML = "<tool-use>\n<shell>\nls\n</shell>\n</tool-use>"


@pytest.mark.parametrize(
    ("written", "text", "valid"),
    [
        (f"\n</think>\n\n{XML}", XML, True),  # as it is taught: the thought is ended at once
        (f"hm\n</think>\n\n{XML}", f"<think>\nhm\n</think>\n\n{XML}", True),
        (f"hm\n{XML}", f"<think>\nhm\n{XML}", False),  # all of it is thought
    ],
)
def test_a_thought_that_the_prompt_begins_is_no_part_of_what_is_run(written: str, text: str, valid: bool, tmp_path: Path) -> None:
    thinking = next(one for one in shipped() if one.name == "trl/qwen3_5_think")
    template = ChatTemplate.load(model_folder(tmp_path, thinking.jinja, thinking.control, thinking.stops))
    asked, _ = questions(told([Message("user", "Go."), Message("assistant", XML)], template, "xml"), template, 1, 99)

    class Saying:
        def generate_all(self, *_: object) -> list[list[int]]:
            return [template.prompt_tokens(written)]

    (answer,) = answer_all(Saying(), template, asked, 99)  # type: ignore[arg-type]
    assert (answer.text, answer.judged["valid call"]) == (text, valid)


def test_a_secret_that_is_not_learned_is_of_no_kind(template) -> None:
    (one,) = told([Message("user", "Go."), Message("assistant", "Key [REDACTED:jwt:1] and ```x```")], template)
    said = texts(one, template)
    assert "REDACTED" not in "".join(said.values()) and said["prose"].endswith("and ```x```") and len(one.turns) == 1


def test_messages_of_other_data_are_refused(template) -> None:
    (one,) = told([Message("user", "Go."), Message("assistant", "So.")], template)
    with pytest.raises(UserError, match="2 turns for 1 in the tokens"):
        tell(one.example, [*one.messages, Message("assistant", "More.")], template, "markdown", "valid.jsonl:1")


@pytest.mark.parametrize("name", [one.name for one in shipped()][::9])
def test_kinds_part_the_learned_tokens_with_every_template(name: str, tmp_path: Path) -> None:
    one = next(one for one in shipped() if one.name == name)
    template = ChatTemplate.load(model_folder(tmp_path, one.jinja, one.control, one.stops, rstrip="phi" in name))
    seen = 0
    for number, shape in enumerate(SHAPES):
        random = np.random.default_rng([number, *name.encode()])
        messages, tools = conversation(random, shape, [*CONTROL, *one.control] if number % 2 else [])
        for example in told(messages, template, "tool", tools):
            learned = example.example.weights > 0
            assert ((example.kinds >= 0) == learned).all() and ((example.after >= 0) == learned).all()
            assert (example.kinds == 3).sum() == len(example.turns) == len(example.example.turns)
            seen += len(example.turns)
    assert seen


def test_the_interval_holds_the_truth_in_about_95_of_100_cases() -> None:
    random, held = np.random.default_rng(0), 0
    for case in range(300):
        whose = np.repeat(np.arange(40), random.integers(5, 60, 40))
        hard, gain = random.normal(2, 0.7, 40)[whose], random.normal(-0.2, 0.3, 40)[whose]
        base = hard + random.normal(0, 1, len(whose))
        tuned = hard + gain + random.normal(0, 1, len(whose))
        ones = np.ones(len(whose))
        found = compare_means(sums_of(whose, base, tuned, ones, ones), seed=case, samples=400)
        held += found.low <= -0.2 <= found.high
    assert 0.90 <= held / 300 <= 0.98


def test_equal_models_differ_by_nothing_and_one_conversation_has_no_interval() -> None:
    losses, ones = np.array([1.0, 2.0, 5.0]), np.ones(3)
    same = compare_means(sums_of([0, 1, 1], losses, losses, ones, ones), seed=0)
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    alone = compare_means(sums_of([0, 0, 0], losses, losses + 1, ones, ones), seed=0)
    assert (alone.base, alone.tuned, alone.difference, alone.low) == (8 / 3, 11 / 3, 1, None)


def test_tokens_weigh_and_answers_count_only_where_a_verdict_applies() -> None:
    found = compare_means(sums_of([0, 1], np.array([1.0, 3.0]), np.array([2.0, 3.0]), *[np.array([1.0, 3.0])] * 2), seed=0)
    assert (found.base, found.tuned) == (1, 1.25)
    shares = sums_of([0, 0, 1], np.array([1.0, 0, 0]), np.array([1.0, 1, 0]), np.array([1.0, 0, 0]), np.array([1.0, 1, 0]))
    assert len(shares.base) == 1  # the other conversation has no verdict
    assert compare_means(shares, seed=0).base == 1
    nothing = compare_means(sums_of([0, 1], np.zeros(2), np.ones(2), np.zeros(2), np.ones(2)), seed=0)
    assert (nothing.base, nothing.tuned, nothing.difference) == (None, 1, None)


def test_a_verdict_on_one_conversation_of_a_model_has_no_interval() -> None:
    """Else each draw that says anything says the same, and nothing would look so sure."""
    only = np.array([1.0, 0.0])
    found = compare_means(sums_of([0, 1], np.zeros(2), 1 - only, only, 1 - only), seed=0)
    assert (found.base, found.tuned, found.difference, found.low, found.high) == (0, 1, 1, None, None)


def test_turns_are_spread_evenly_over_conversations_and_within_them() -> None:
    counts = {name: len(places) for name, places in spread({"a": 9, "b": 2, "c": 1}, 7).items()}
    assert counts == {"a": 4, "b": 2, "c": 1}
    assert spread({"a": 9}, 3) == {"a": [0, 4, 8]}
    assert spread({str(i): 5 for i in range(10)}, 3).keys() == {"0", "4", "9"}
    assert spread({"a": 1}, 5) == {"a": [0]} and spread({}, 5) == {} and spread({"a": 3}, 0) == {}
