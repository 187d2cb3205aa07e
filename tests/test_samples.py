"""Held-out turns answered on the way: the same ones each time, written once, and training does not notice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from short_runs import STEPS, cut_after, prepared, settings, tensors

from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Conversation, Message, write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.engines import open_engine
from mlx_finetune.errors import UserError
from mlx_finetune.training.metrics import read_metrics
from mlx_finetune.training.run import execute, plan_resume, plan_run
from mlx_finetune.training.samples import TAIL, choose_prompts

FEW: dict[str, Any] = {"sample_prompts": 2, "sample_tokens": 6, "dropout": 0.1}


@pytest.fixture(scope="module")
def data(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tiny_llama, tmp_path_factory.mktemp("data"), "ls")


@pytest.fixture(scope="module")
def template(tiny_llama: Path, data: Path) -> ChatTemplate:
    return ChatTemplate.load(tiny_llama, Dataset.open(data).info["chat_template"])


@pytest.fixture(scope="module")
def answered(tiny_llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An uninterrupted run of each engine."""
    folder = tmp_path_factory.mktemp("answered")
    return {name: run(settings(tiny_llama, data, folder / name, name, **FEW)) for name in ("mlx", "torch")}


def run(values: dict[str, Any]) -> Path:
    plan = plan_run(make_config(values, "test"))
    execute(plan, lambda done, steps, standing: None)
    return plan.run


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def made_of(folder: Path, model: Path, conversations: list[Conversation], **values: Any) -> Dataset:
    write_conversations(folder / "c.jsonl", conversations)
    told = {"max_length": 512, "valid_fraction": 0.5, "validation_by": "hash", "openassistant_share": 0.6} | values
    prepare([folder / "c.jsonl"], ChatTemplate.load(model), make_config(told, "test"), folder / "dataset", {})
    return Dataset.open(folder / "dataset")


def chat(number: int, source: str = "gptme", turns: int = 1, answer: str = "```shell\nls\n```") -> Conversation:
    messages = [Message("system", "You are gptme.")]
    for turn in range(turns):
        messages += [Message("user", f"ask {number} {turn} " + "please " * turn), Message("assistant", f"{answer} {number} {turn}")]
    return Conversation(tuple(messages), source, f"log-{number}", "MIT")


def test_training_is_bit_identical_with_and_without_answers(
    engine_name: str, answered: dict[str, Path], tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    quiet = run(settings(tiny_llama, data, tmp_path / "run", engine_name, **FEW | {"sample_prompts": 0}))
    expected, found = tensors(quiet, STEPS), tensors(answered[engine_name], STEPS)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    rows = [[row["loss"] for row in read_metrics(each / "metrics.jsonl")] for each in (quiet, answered[engine_name])]
    assert rows[0] == rows[1] and not (quiet / "samples.jsonl").exists()


def test_each_held_out_loss_has_its_answers_those_of_the_base_model_first(
    engine_name: str, answered: dict[str, Path], tiny_llama: Path, template: ChatTemplate, data: Path, tmp_path: Path
) -> None:
    rows = samples(answered[engine_name])
    assert [(row["step"], row["prompt"]) for row in rows] == [(step, k) for step in (0, 4, 8, 10) for k in (0, 1)]
    assert all(row.keys() == {"step", "prompt", "conversation", "question", "logged", "answer"} for row in rows)
    prompts = choose_prompts(Dataset.open(data), template, 2)
    told = {(row["prompt"], row["conversation"], row["question"], row["logged"]) for row in rows}
    assert told == {(k, p.conversation, p.question, p.logged) for k, p in enumerate(prompts)}
    base = open_engine(make_config(settings(tiny_llama, data, tmp_path, engine_name), "test"), tiny_llama)
    for row, prompt in zip(rows, prompts, strict=False):
        assert row["answer"] == template.decode(list(base.generate(prompt.tokens, 6, template.stop_ids)))


def test_a_killed_run_that_goes_on_leaves_the_same_answers_and_none_twice(
    engine_name: str, answered: dict[str, Path], tmp_path: Path
) -> None:
    killed = cut_after(answered[engine_name], 5, tmp_path / "run")
    with (killed / "samples.jsonl").open("a") as file:
        file.write('{"step": 12, "prom')  # cut in the midst of a line
    execute(plan_resume(killed, {}), lambda done, steps, standing: None)
    assert (killed / "samples.jsonl").read_bytes() == (answered[engine_name] / "samples.jsonl").read_bytes()


def test_a_run_that_goes_on_may_ask_otherwise_or_not_at_all(answered: dict[str, Path], tmp_path: Path) -> None:
    for name, values, expected in (
        ("none", {"sample_prompts": 0}, [(0, 2), (4, 2)]),
        ("one", {"sample_prompts": 1, "sample_tokens": 3}, [(0, 2), (4, 2), (8, 1), (10, 1)]),
    ):
        killed = cut_after(answered["torch"], 5, tmp_path / name)
        execute(plan_resume(killed, values), lambda done, steps, standing: None)
        rows = samples(killed)
        assert [(step, sum(row["step"] == step for row in rows)) for step in sorted({row["step"] for row in rows})] == expected
        assert np.array_equal(*(next(iter(tensors(each, STEPS).values())) for each in (killed, answered["torch"])))


def test_a_prompt_is_the_very_tokens_before_a_learned_turn(data: Path, template: ChatTemplate) -> None:
    dataset = Dataset.open(data)
    prompts = choose_prompts(dataset, template, 99)
    learned = sum(len(example.turns) for example in dataset.valid if example.source == "gptme")
    assert len(prompts) == learned > 2
    for prompt in prompts:
        (example,) = [e for e in dataset.valid if e.conversation == prompt.conversation]
        n = len(prompt.tokens)
        assert example.tokens[:n].tolist() == list(prompt.tokens) and example.weights[n - 1] == 0 < example.weights[n]
        assert prompt.question.startswith("list ") and prompt.logged.startswith("```shell\nls")
        assert template.decode(list(prompt.tokens)).endswith(f"{prompt.question}\nassistant\n")


def test_one_turn_of_each_conversation_is_asked_before_a_second_one_and_short_contexts_come_first(
    tiny_llama: Path, tmp_path: Path
) -> None:
    dataset = made_of(tmp_path, tiny_llama, [chat(i, turns=i % 3 + 1) for i in range(12)])
    template = ChatTemplate.load(tiny_llama, dataset.info["chat_template"])
    conversations = len({example.conversation for example in dataset.valid})
    prompts = choose_prompts(dataset, template, 99)
    for first in (1, 3, conversations):
        assert len({prompt.conversation for prompt in prompts[:first]}) == first
        assert choose_prompts(dataset, template, first) == prompts[:first]
    lengths = [len(prompt.tokens) for prompt in prompts[:conversations]]
    assert lengths == sorted(lengths) and len(prompts) > conversations >= 3


def test_openassistant_is_asked_only_where_nothing_else_was_held_out(tiny_llama: Path, tmp_path: Path) -> None:
    for name, sources, expected in (("both", ("gptme", "openassistant"), "gptme"), ("one", ("openassistant",), "openassistant")):
        (tmp_path / name).mkdir()
        mixed = [chat(i, sources[i % len(sources)]) for i in range(12)]
        dataset = made_of(tmp_path / name, tiny_llama, mixed, openassistant_valid_fraction=0.5)
        template = ChatTemplate.load(tiny_llama, dataset.info["chat_template"])
        source_of = {example.conversation: example.source for example in dataset.valid}
        asked = {source_of[prompt.conversation] for prompt in choose_prompts(dataset, template, 99)}
        assert asked == {expected}


def test_a_turn_with_a_redacted_secret_is_one_turn_and_the_question_keeps_its_end(tiny_llama: Path, tmp_path: Path) -> None:
    secret = "[REDACTED:password:1]"
    question, answer = "word " * 200 + "what now?", Message("assistant", f"I write\n{secret}\nand go on")
    asked = [(Message("system", "You are gptme."), Message("user", f"{i} {question}"), answer) for i in range(2)]
    made = [Conversation(messages, "gptme", f"log-{i}", "MIT") for i, messages in enumerate(asked)]
    dataset = made_of(tmp_path, tiny_llama, made, max_length=2048)
    template = ChatTemplate.load(tiny_llama, dataset.info["chat_template"])
    (prompt,) = choose_prompts(dataset, template, 3)
    assert prompt.logged == f"I write\n{secret}\nand go on" and template.decode(list(prompt.tokens)).endswith("assistant\n")
    assert prompt.question == question[-TAIL:]


def test_messages_that_are_gone_or_are_others_are_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    dataset = made_of(tmp_path, tiny_llama, [chat(i) for i in range(6)])
    template = ChatTemplate.load(tiny_llama, dataset.info["chat_template"])
    path = dataset.folder / "valid.jsonl"
    whole = path.read_text()
    for damaged in (whole.splitlines(keepends=True)[0], "not json\n" * 9, whole.replace('"weight": 1', '"weight": 0')):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"valid\.jsonl: not the messages that the tokens were made of"):
            choose_prompts(dataset, template, 99)
    path.unlink()
    with pytest.raises(UserError, match="not the messages"):
        choose_prompts(dataset, template, 1)
    assert choose_prompts(dataset, template, 0) == []


def test_a_run_with_nothing_held_out_answers_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    dataset = made_of(tmp_path, tiny_llama, [chat(i) for i in range(4)], valid_fraction=0.0)
    made = run(settings(tiny_llama, dataset.folder, tmp_path / "run", "torch", steps=1, sample_prompts=3))
    assert not len(dataset.valid) and not (made / "samples.jsonl").exists() and (made / "best").exists()


def test_answers_are_no_part_of_the_rates(answered: dict[str, Path], tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    values = settings(tiny_llama, data, tmp_path / "run", "torch", **FEW | {"sample_tokens": 40, "eval_every": 5})
    trained, _ = execute(plan_run(make_config(values, "test")), lambda done, steps, standing: None)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["split"] == "train"]
    assert trained.seconds == pytest.approx(sum(row["seconds"] for row in rows), abs=0.001 * STEPS)
    assert all(row["memory"] > 2**20 for row in rows)


def test_the_command_line_says_what_is_answered(cli: Callable[..., tuple[int, str, str]]) -> None:
    told = " ".join(cli("train", "--help")[1].split())
    assert "sample_prompts = 3: held-out turns answered with each held-out loss; 0: none" in told
