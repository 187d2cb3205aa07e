"""Served as trained against what gptme really sent: before each turn of a prepared log stand the tokens of the recorded request."""

import json
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alternating import GEMMA, GEMMA2, MINISTRAL
from chats import LLAMA3, RAISES, STRIPS_THINKING, template_of
from shipped_templates import Shipped, model_folder
from tiny_models import CHATML
from tool_chats import QWEN

from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Conversation, Message, write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.policies import POLICIES
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.rows import rows_of
from mlx_finetune.data.sources import gather, gptme
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.data.tool_calls import to_native
from mlx_finetune.export.fuse import write_template

DATA = Path(__file__).parents[2] / "shared" / "data"
TEXT = (
    "markdown_interactive__2026-06-03-jumping-green-pelican",
    "markdown_noninteractive__2026-06-05-retry-backoff-client",
    "old_0.27.0_markdown__2025-04-22-walking-happy-mouse",
    "xml__2026-07-13-dancing-red-penguin",
)
TOOL, PARALLEL = "tool__2026-06-18-climbing-orange-robot", "tool_parallel_calls__2026-07-16-swimming-happy-seal"
# Sent in another run of the conversation of this log: in a folder of its own, for the first one by another model.
AGAIN, ATTACHED = "2026-06-09-skipping-red-seal", "markdown_attachments"
FOLDED, SHORT = "markdown_qwen3.5_folded_system", "markdown_short_prompt_4_tools"
SAME = {
    "Qwen3.5-9B-4bit": "Qwen3-Coder-30B-A3B-Instruct-4bit",
    "shopapi-x-qwen35": "shopapi",
    "shopapi-x-short-4tools": "shopapi",
}
OWN = {"chatml": CHATML, "llama3": LLAMA3, "strips thinking": STRIPS_THINKING, "raises": RAISES, "qwen": QWEN}
OWN |= {"gemma": GEMMA, "gemma 2": GEMMA2, "ministral": MINISTRAL}
TRL = (
    "qwen2_5",
    "qwen3",
    "qwen3_instruct_2507",
    "qwen3_5_think",
    "qwen3_5_nothink",
    "qwen3_8",
    "llama3_2",
    "gemma3",
    "lfm2_2_5_v2",
)
NO_CALLS = {"chatml", "llama3", "strips thinking", "raises", "gemma", "gemma 2", "trl/gemma3"}  # write no native calls
ONE_CALL = {"trl/llama3_2"}  # and no text beside it


@dataclass(frozen=True)
class Recorded:
    """A conversation of a log as `collect` hands it on, and the body of the request for each of its turns."""

    conversation: Conversation
    bodies: list[dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def _recorded_data() -> None:
    if not (DATA / "gptme-requests").is_dir():
        pytest.skip("what gptme sent lies in ../shared, which is no part of the project")


@cache
def recorded(name: str) -> Recorded:
    text = (DATA / "gptme-requests" / f"{name}.json").read_text(encoding="utf-8")
    for other, ours in SAME.items():
        text = text.replace(other, ours)
    bodies = [request["body"] for request in json.loads(text)]
    if name == ATTACHED:  # whose log we have not: the turns are those of the request
        return Recorded(_of_body(bodies[-1]), bodies)
    conversation = next(one for one in logs() if one.name == (name.split("__")[1] if "__" in name else AGAIN))
    if name == SHORT:  # the prompt that `collect --system short` would have put there
        rest = [message for i, message in enumerate(conversation.messages) if message.role != "system" or i > 2]
        conversation = replace(conversation, messages=(_of_body(bodies[0]).messages[0], *rest))
    if name in (TOOL, PARALLEL):
        conversation = replace(conversation, messages=to_native(conversation.messages), tools=tuple(bodies[0]["tools"]))
        assert all(body["tools"] == bodies[0]["tools"] for body in bodies)
    return Recorded(conversation, bodies)


@cache
def logs() -> list[Conversation]:
    return list(gather(gptme.read(DATA / "gptme-logs")).conversations)


def _of_body(body: Mapping[str, Any]) -> Conversation:
    messages = [Message(m["role"], "".join(part["text"] for part in m["content"])) for m in body["messages"]]
    return Conversation((*messages, Message("assistant", "Done.")), "gptme", ATTACHED, "private")


def folder_of(tmp_path: Path, name: str) -> Path:
    """A model's folder with this template."""
    import trl

    if name in OWN:
        template_of(tmp_path, OWN[name])
        return tmp_path
    text = (Path(trl.__file__).parent / "chat_templates" / f"{name.removeprefix('trl/')}.jinja").read_text(encoding="utf-8")
    one = Shipped(name, text)
    return model_folder(tmp_path, one.jinja, one.control, one.stops)


def served(folder: Path, template: ChatTemplate) -> Any:
    """What an export of the model is served with."""
    from transformers import AutoTokenizer

    shutil.copytree(folder, folder / "export")
    write_template(folder / "export", template.source)
    return AutoTokenizer.from_pretrained(folder / "export")


def tokens_of(tokenizer: Any, body: Mapping[str, Any]) -> list[int]:
    """What mlx_lm.server 0.32.2 feeds for a request, by its own function: contents joined, arguments decoded."""
    from mlx_lm.server import process_message_content

    messages = deepcopy(body["messages"])
    process_message_content(messages)
    return list(
        tokenizer.apply_chat_template(
            messages, tools=body.get("tools"), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    )


def prepared(folder: Path, template: ChatTemplate, conversations: Sequence[Conversation]) -> Dataset:
    write_conversations(folder / "collected.jsonl", conversations)
    config = make_config({"valid_fraction": 0, "max_length": 100_000}, "test")
    prepare([folder / "collected.jsonl"], template, config, folder / "dataset", {})
    return Dataset.open(folder / "dataset")


def learned(dataset: Dataset, conversation: Conversation) -> dict[int, tuple[list[int], list[int]]]:
    """Of each turn of the conversation: the tokens before it, and its own."""
    turns = {}
    for example in dataset.train:
        if example.conversation == conversation.id:
            edges = np.flatnonzero(np.diff(np.concatenate([[0], example.weights > 0, [0]]))).reshape(-1, 2)
            assert len(edges) == len(example.turns)
            for turn, (start, end) in zip(example.turns, edges.tolist(), strict=True):
                assert turn not in turns
                turns[turn] = (example.tokens[:start].tolist(), example.tokens[start:end].tolist())
    return turns


def check(template: ChatTemplate, tokenizer: Any, dataset: Dataset, one: Recorded) -> int:
    """How many turns stand behind exactly the tokens of their request, end where a server stops, and say what the log says."""
    messages = one.conversation.messages
    turns = learned(dataset, one.conversation)
    for turn, (before, taught) in turns.items():
        body = next(body for body in one.bodies if _place(body, one.conversation) == turn)
        assert before == tokens_of(tokenizer, body), (one.conversation.name, turn)
        assert taught[-1] in template.stop_ids
        assert messages[turn].content.strip() in str(template.special.decode(taught, skip_special_tokens=False))
    return len(turns)


def _place(body: Mapping[str, Any], conversation: Conversation) -> int:
    """Which turn was asked for: the assistant's messages are sent one for one."""
    count = sum(message["role"] == "assistant" for message in body["messages"])
    return [i for i, message in enumerate(conversation.messages) if message.role == "assistant"][count]


@pytest.mark.parametrize("name", [*OWN, *(f"trl/{name}" for name in TRL)])
def test_the_tokens_before_each_turn_are_those_of_the_request_that_gptme_sent(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / "model", name)
    template = ChatTemplate.load(folder)
    tokenizer = served(folder, template)
    texts = [recorded(one) for one in (*TEXT, SHORT)]
    native = [recorded(one) for one in (TOOL, PARALLEL)]
    dataset = prepared(tmp_path, template, [one.conversation for one in (*texts, *native)])
    for one in texts:
        assert check(template, tokenizer, dataset, one) == len(one.bodies) == one.conversation.assistant_turns
    found = [check(template, tokenizer, dataset, one) for one in native]
    tally = dataset.info["train"]
    assert tally["turns_inexact"] == {} and tally["exact_turns"] == tally["learned_turns"]
    if name in NO_CALLS:
        (reason,) = tally["turns_refused"]
        assert found == [0, 0] and "collect with --tool-calls text" in reason and tally["turns_refused"][reason] == 12
    elif name in ONE_CALL:
        assert found == [2, 0] and sum(tally["turns_refused"].values()) == 10  # the text beside a call is not written
    else:
        assert found == [6, 6] and tally["turns_refused"] == {}


@pytest.mark.parametrize("name", ["raises", "trl/qwen3_5_think", "trl/qwen3_5_nothink", "trl/qwen3_8"])
def test_where_gptme_folds_for_the_model_a_log_trains_what_it_sends_also_with_the_models_own_template(
    tmp_path: Path, name: str
) -> None:
    folder = folder_of(tmp_path / "model", name)
    template = ChatTemplate.load(folder)
    assert template.policy.name == "folded"
    one = recorded(FOLDED)
    sent = [message["role"] for message in one.bodies[-1]["messages"]]
    assert sent.count("system") == 1 < [message.role for message in one.conversation.messages].count("system")
    dataset = prepared(tmp_path, template, [one.conversation])
    assert check(template, served(folder, template), dataset, one) == len(one.bodies)
    from transformers import AutoTokenizer

    assert check(template, AutoTokenizer.from_pretrained(folder), dataset, one) == len(one.bodies)  # nothing to fold in it


@pytest.mark.parametrize("name", ["chatml", "gemma", "gemma 2", "trl/qwen3", "trl/qwen3_5_think", "trl/gemma3"])
def test_a_content_of_several_parts_is_trained_as_a_server_joins_them(tmp_path: Path, name: str) -> None:
    folder, one = folder_of(tmp_path / "model", name), recorded(ATTACHED)
    assert len(one.bodies[-1]["messages"][3]["content"]) == 2
    template = ChatTemplate.load(folder)
    assert check(template, served(folder, template), prepared(tmp_path, template, [one.conversation]), one) == 2


@pytest.mark.parametrize("name", [*TEXT, TOOL, PARALLEL])
def test_a_template_is_handed_the_fields_that_a_server_hands_on_and_no_others(name: str) -> None:
    from mlx_lm.server import process_message_content

    one = recorded(name)
    for body in one.bodies:
        messages = deepcopy(body["messages"])
        process_message_content(messages)
        assert rows_of(one.conversation.messages[: len(messages)]) == [{"content": ""} | message for message in messages]


def test_blanks_that_a_client_sends_around_a_turn_are_not_served(tmp_path: Path) -> None:
    """gptme sends a line end behind the text beside a call, and a turn whose last fence is followed by empty lines as it is."""
    one = recorded(TOOL)
    assert "\n" in {message.content[-1:] for message in one.conversation.messages if message.tool_calls}
    for name, jinja in (("chatml", CHATML), ("qwen", QWEN), ("gemma", GEMMA)):
        template = template_of(tmp_path / name, jinja)
        tidy = [Message("user", "a"), Message("assistant", "```shell\nls\n```"), Message("system", "b\n\n"), Message("user", "c")]
        as_sent = [replace(m, content=f"\n{m.content}\n\n") if m.role == "assistant" else m for m in tidy]
        assert template.render(as_sent, True) == template.render(tidy, True)
        encoded = template.encode([*as_sent, Message("assistant", " d\n")])
        assert encoded.exact == (True, True)
        assert np.array_equal(encoded.tokens[: len(template.prompt(as_sent))], template.prompt(as_sent))


def test_blanks_of_others_stay_and_the_models_own_template_stays_where_it_takes_blanks_off(tmp_path: Path) -> None:
    assert ChatTemplate.load(folder_of(tmp_path, "llama3")).source == LLAMA3
    template = template_of(tmp_path / "chatml", CHATML)
    assert template.policy == POLICIES[0] and template.source.endswith(CHATML) != (template.source == CHATML)
    assert " a \n" in template.render([Message("user", " a \n"), Message("assistant", "b")])
