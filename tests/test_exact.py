"""Served as trained: before each learned turn stand the very tokens that a server would feed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import CHATML, LLAMA3, RAISES, STRIPS_THINKING, ZEPHYR, chat, chatml_with, conversation_of, random_chat, template_of
from test_policies import ALTERNATES, NO_SYSTEM

import mlx_finetune
from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Conversation, Message, write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.examples import make_examples
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.sources import gather, gptme, openassistant
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError

SAMPLE = Path(mlx_finetune.__file__).parent / "sample"
# As Qwen3: thinking stays only behind the last question, and the last answer of all has an empty block where it has none.
LAST_QUESTION = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' and not m.content.startswith('<system>') %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
THINKS = (
    "(message['content'] if loop.index0 > ns.last else message['content'].split('</think>')[-1].lstrip('\n'))"
    " if message['role'] == 'assistant' and '</think>' in message['content'] else "
    "('<think>\n\n</think>\n\n' if message['role'] == 'assistant' and loop.last else '') + message['content']"
)
QWEN3 = LAST_QUESTION + chatml_with(THINKS)
# As Qwen3.5: the same, one system message only, and the prompt opens the thinking.
QWEN35 = RAISES.replace(CHATML, "") + QWEN3.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
GEMMA = NO_SYSTEM.replace("message['content']", "message['content'] | trim")
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "qwen3.5": QWEN35,
    "gemma": GEMMA,
    "mistral": ALTERNATES,
    "strips": STRIPS_THINKING,
}
# The prompt asks another than the one who has answered, where there is a system message.
ASKS_ANOTHER = CHATML.replace(
    "'<|im_start|>assistant\n'", "('<|im_start|>assistant\n' if messages[0].role != 'system' else '<|im_start|>bot\n')"
)
THOUGHTFUL = [
    *(Message("system", text) for text in ("prompt", "boundary", "today")),
    Message("user", "how many files?"),
    Message("assistant", "<think>\nI should list them.\n</think>\n\n```shell\nls | wc -l\n```"),
    Message("system", "Ran command\n\n3"),
    Message("assistant", "<think>\nNow I know.\n</think>\n\nThere are 3."),
    Message("user", "and hidden ones?"),
    Message("assistant", "```shell\nls -A | wc -l\n```"),
    Message("system", "5"),
    Message("assistant", "<think>\n5 - 3\n</think>\n\nTwo."),
    Message("user", "thanks"),
    Message("assistant", "Gladly."),
]


def prepared(folder: Path, conversations: Sequence[Conversation], template: ChatTemplate, **settings: Any) -> Dataset:
    write_conversations(folder / "all.jsonl", conversations)
    config = make_config(
        {"max_length": 8192, "valid_fraction": 0, "openassistant_valid_fraction": 0, "openassistant_share": 0.9} | settings, "test"
    )
    prepare([folder / "all.jsonl"], template, config, folder / "dataset", {"model": "tiny"})
    return Dataset.open(folder / "dataset")


def check_exact(dataset: Dataset, template: ChatTemplate) -> int:
    """Compares each turn of each example with what a server would feed; gives back how many there are."""
    rows = [json.loads(line) for line in (dataset.folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    turns = 0
    for row, example in zip(rows, dataset.train, strict=True):
        messages = [Message(m["role"], m["content"], m["weight"]) for m in row["messages"]]
        learned = [i for i, m in enumerate(messages) if m.role == "assistant" and m.weight]
        assert len(learned) == len(example.turns)
        for i in learned:
            fed = template.prompt(template.as_learned(messages[:i]))
            assert np.array_equal(example.tokens[: len(fed)], fed)
            assert example.weights[len(fed)] > 0 == example.weights[len(fed) - 1]
            rest = example.weights[len(fed) :] > 0
            end = len(fed) + (len(rest) if rest.all() else int(np.argmin(rest)))
            said = template.decode(example.tokens[len(fed) : end].tolist()).strip()
            opened = template.decode(fed.tolist()).rstrip().endswith("<think>")
            content = messages[i].content.strip()
            expected = content.removeprefix("<think>\n") if opened and "</think>" in content else content
            assert said == (expected if "</think>" in content or not opened else f"</think>\n\n{content}")
            assert example.tokens[end - 1] in template.stop_ids
            turns += 1
    return turns


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_turn_of_thinking_chats_stands_after_what_is_served(tmp_path: Path, name: str) -> None:
    template = template_of(tmp_path / "model", TEMPLATES[name], eos="<|im_end|>")
    dataset = prepared(tmp_path, [conversation_of(THOUGHTFUL)], template)
    tally = dataset.info["train"]
    assert check_exact(dataset, template) == tally["learned_turns"] == tally["exact_turns"] == tally["served_as_trained"] == 5
    assert tally["turns_refused"] == {} == tally["turns_inexact"]
    own = tally["turns_of_own_context"]
    assert tally["exact_in_one_rendering"] + own == 5 and tally["examples"] == own + (own < 5)
    assert bool(own) == (name in ("qwen3", "qwen3.5", "strips"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_turn_of_the_sample_stands_after_what_is_served(tmp_path: Path, name: str) -> None:
    template = template_of(tmp_path / "model", TEMPLATES[name], eos="<|im_end|>")
    trees = gather(openassistant.read(SAMPLE / "openassistant.trees.jsonl", openassistant.EVERYTHING)).conversations
    sample = [*gather(gptme.read(SAMPLE / "gptme-logs")).conversations, *trees]
    dataset = prepared(tmp_path, sample, template, max_length=2048)
    tally = dataset.info["train"]
    assert check_exact(dataset, template) == tally["learned_turns"] == tally["exact_turns"]
    assert tally["learned_turns"] + tally["turns_too_long"] == sum(one.assistant_turns for one in sample)


def test_random_chats_are_served_as_trained_or_counted(tmp_path: Path) -> None:
    for seed, name in enumerate(TEMPLATES):
        random = np.random.default_rng(seed)
        template = template_of(tmp_path / name, TEMPLATES[name], eos="<|im_end|>")
        chats = [conversation_of([*chat(f"q {i}", "a"), *random_chat(random)], f"g{i}") for i in range(40)]
        dataset = prepared(tmp_path / name, chats, template, allow_inexact=True)
        tally = dataset.info["train"]
        counted = sum(tally["turns_refused"].values()) + tally["turns_too_long"]
        assert tally["learned_turns"] + counted == sum(one.assistant_turns for one in chats)
        inexact = sum(tally["turns_inexact"].values()) + tally["turns_behind_control_text"]
        assert tally["exact_turns"] + inexact == tally["learned_turns"] > 40


def test_what_others_said_is_never_lost_in_a_context_of_its_own(tmp_path: Path) -> None:
    template = template_of(tmp_path, ZEPHYR, eos="<|im_end|>")
    with pytest.raises(Refused, match="drops a message of role tool"):
        template.encode_turn([*chat("a", "b"), Message("tool", "output"), Message("assistant", "c")])


def test_a_context_of_its_own_masks_placeholders_and_keeps_the_weight(tmp_path: Path) -> None:
    template = template_of(tmp_path, QWEN3, eos="<|im_end|>")
    turn = Message("assistant", "export TOKEN=[REDACTED:github_token:1] && ls", 2.5)
    encoded = template.encode_turn([*THOUGHTFUL[:-1], turn])
    learned = template.decode(encoded.tokens[encoded.weights > 0].tolist())
    assert "REDACTED" not in learned and learned.startswith("export") and set(encoded.weights.tolist()) == {0, 2.5}
    assert encoded.placeholders > 0 and encoded.exact == (True,)


def test_what_cannot_be_exact_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    template = template_of(tmp_path / "model", ASKS_ANOTHER, eos="<|im_end|>")
    odd = [conversation_of([Message("system", "s"), *chat("what?", "an answer")], "a"), conversation_of(chat("so?", "so."), "b")]
    with pytest.raises(
        UserError, match="1 turns would be learned in another context than is served, 1 of them: the template"
    ) as error:
        prepared(tmp_path, odd, template)
    assert "--allow-inexact" in error.value.hint and not (tmp_path / "dataset").exists()
    tally = prepared(tmp_path, odd, template, allow_inexact=True).info["train"]
    assert (tally["learned_turns"], tally["exact_turns"], sum(tally["turns_inexact"].values())) == (2, 1, 1)


def test_a_conversation_that_begins_with_an_answer_learns_only_what_can_be_asked_for(tmp_path: Path) -> None:
    template = template_of(tmp_path / "model", STRIPS_THINKING, eos="<|im_end|>")
    tally = prepared(tmp_path, [conversation_of(chat("hello, I am here", "hi", "what?", first="assistant"))], template).info[
        "train"
    ]
    assert tally["learned_turns"] == 1 and tally["turns_refused"] == {"nothing stands before it that a server could be sent": 1}


def test_turns_with_a_context_of_their_own_are_a_family_and_windows_that_only_share_a_prompt_are_not(tmp_path: Path) -> None:
    qwen3, plain = template_of(tmp_path / "qwen3", QWEN3), template_of(tmp_path / "plain", CHATML)
    talk = [Message("system", "Prompt. " * 20)]
    for turn in range(4):
        talk += [Message("user", f"{turn} do it"), Message("assistant", f"<think>\nhm {turn}\n</think>\n\nDone {turn}.")]
    made = make_examples(Conversation(tuple(talk), "gptme", "log-1", "private"), qwen3, 1024)
    assert len(made.examples) > 2 and {one.family for one in made.examples} == {"log-1 0"}
    long = [talk[0]]
    for turn in range(12):
        long += [Message("user", f"{turn} " + "words of it " * 40), Message("assistant", f"Done {turn}.")]
    made = make_examples(Conversation(tuple(long), "gptme", "log-2", "private"), plain, 512)
    assert len({one.family for one in made.examples}) == len(made.examples) > 2
