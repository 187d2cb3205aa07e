"""Base and tuned side by side: the same losses as the run's own, in parts that add up, and answers that are judged."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from finished_runs import make_base, make_run
from tiny_models import make_tiny

from mlx_finetune.config import load_config, make_config
from mlx_finetune.data.conversation import Conversation, Message, write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.engines import open_engine
from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.compare import Material, compare, measure_model, no_progress, open_run, open_tuned
from mlx_finetune.evaluation.token_kinds import KINDS
from mlx_finetune.evaluation.wanted import Wanted
from mlx_finetune.training.held_out import held_out_loss
from mlx_finetune.training.run import execute, plan_run

ALWAYS = "```shell\nls\n```"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four steps; gptme and OpenAssistant are held out."""
    root = tmp_path_factory.mktemp("evaluate")
    make_base(root)
    return make_run(root, "mlx")


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model was made to answer everything with one call; its data has a test split."""
    root = tmp_path_factory.mktemp("caller")
    make_tiny("llama", root / "base", tokenizer=True)
    talks = [
        Conversation((Message("user", f"What is in folder {i}?"), Message("assistant", ALWAYS)), "gptme", f"log-{i}", "MIT")
        for i in range(24)
    ]
    write_conversations(root / "gptme.jsonl", talks)
    told = {"max_length": 128, "valid_fraction": 0.3, "test_fraction": 0.2, "validation_by": "hash"}
    prepare([root / "gptme.jsonl"], ChatTemplate.load(root / "base"), make_config(told, "test"), root / "dataset", {"model": "m"})
    told = {"model": str(root / "base"), "data": str(root / "dataset"), "out": str(root / "run"), "engine": "mlx", "rank": 8}
    told |= {"alpha": 16, "steps": 60, "batch_size": 8, "learning_rate": 1e-2, "eval_every": 60, "save_every": 60}
    execute(plan_run(make_config(told, "test")), lambda done, steps, note: None)
    return root / "run"


def test_losses_are_those_of_the_run_and_their_parts_add_up(run: Path, engine_name: str) -> None:
    comparison, engine = compare(run, "step-000004", engine_name)
    config, _, _ = open_run(run, "step-000004")
    tuned = held_out_loss(engine, Dataset.open(Path(config.data)).held_out(config.batch_size))
    assert comparison.tuned and comparison.tuned.loss == pytest.approx(tuned.loss, abs=1e-6)  # sums of float32 in another order
    assert comparison.tuned.by_source == pytest.approx(tuned.by_source, abs=1e-6)
    assert (comparison.tuned.tokens, comparison.tuned.tokens_by_source) == (tuned.tokens, tuned.tokens_by_source)
    rows = {(row.group, row.name): row for row in comparison.rows}
    whole = rows["all", "all"]
    assert (whole.base, whole.tuned, whole.tokens) == (comparison.base.loss, comparison.tuned.loss, comparison.tuned.tokens)
    for group in ("kind", "turn"):
        parts = [row for (kind, _), row in rows.items() if kind == group]
        assert sum(row.tokens for row in parts) == whole.tokens
        assert sum(row.tokens * row.tuned for row in parts) / whole.tokens == pytest.approx(whole.tuned)
    assert {name for group, name in rows if group == "source"} == {"gptme", "openassistant"}
    for row in comparison.rows:
        assert row.difference == row.tuned - row.base
        assert row.conversations < 2 or (row.low <= row.difference + 1e-12 and row.difference - 1e-12 <= row.high)


def test_both_engines_measure_the_same(run: Path) -> None:
    mlx, torch = (compare(run, "step-000004", name)[0].rows for name in ("mlx", "torch"))
    for one, other in zip(mlx, torch, strict=True):
        assert (one.group, one.name, one.tokens) == (other.group, other.name, other.tokens)
        assert (one.base, one.tuned) == pytest.approx((other.base, other.tuned), abs=1e-4)


def test_an_adapter_that_learned_nothing_differs_by_nothing(run: Path, engine_name: str) -> None:
    config = make_config(load_config(run / "config.yaml", {}).to_dict() | {"engine": engine_name}, "test")
    material = Material.of(Dataset.open(Path(config.data)), Path(config.model), 2, Wanted(generate=4, limit=40))
    engine = open_engine(config, Path(config.model))
    fresh = material.measure(engine, "fresh", no_progress)
    comparison = material.compared(material.measure(engine, "base", no_progress), fresh)
    for row in comparison.rows:
        assert (row.difference, row.low, row.high) in ((0, 0, 0), (0, None, None))
    assert comparison.generation
    assert all(rate["difference"] in (0, None) for rate in comparison.generation["rates"])


def test_a_model_that_always_calls_has_a_rate_of_one(caller: Path) -> None:
    comparison, _ = compare(caller, "latest", wanted=Wanted(generate=3, limit=40))
    generation = json.loads((caller / "evaluation.json").read_text())["generation"]
    assert (generation["turns"], generation["conversations"], generation["format"]) == (3, 3, "markdown")
    rates = {rate["name"]: rate for rate in generation["rates"]}
    names = ("valid call", "same tool", "fence closed", "shell parses", "stops by itself", "no repetition", "today's conventions")
    assert {name: (rates[name]["tuned"], rates[name]["of_tuned"]) for name in names} == dict.fromkeys(names, (1, 3))
    assert (rates["valid call"]["base"], rates["valid call"]["low"], rates["valid call"]["high"]) == (0, 1, 1)
    assert rates["shell parses"]["base"] is rates["shell parses"]["difference"] is None  # the base writes no command
    for sample in generation["samples"]:
        assert sample["logged"] == sample["tuned"] == ALWAYS != sample["base"] and sample["question"].startswith("What is in")
        assert sample["judged"]["tuned"]["valid call"] and not sample["judged"]["base"]["valid call"]
    row = next(row for row in comparison.rows if row.name == "inside a call")
    assert row.high < 0 and KINDS[1] == row.name


def test_turns_longer_than_an_answer_may_be_are_not_asked(caller: Path) -> None:
    config, model, _ = open_run(caller, "latest")
    material = Material.of(Dataset.open(Path(config.data)), model, 8, Wanted(generate=9, limit=3))
    assert (material.asked, material.left_out) == ([], len(Dataset.open(Path(config.data)).valid))
    assert "no answers were asked for" in compare(caller, "latest", wanted=Wanted(generate=9, limit=3))[0].note


def test_the_test_split_is_measured_where_it_is_asked_for(caller: Path, run: Path, cli) -> None:
    status, out, err = cli("evaluate", caller, "--checkpoint", "latest", "--test", "--generate", 2, "--limit", 40, "--json")
    found = json.loads(out)
    counts = json.loads((caller.parent / "dataset" / "dataset.json").read_text())["test"]["conversations"]["gptme"]
    assert (status, found["split"], found["rows"][0]["conversations"]) == (0, "test", counts)
    assert found["generation"]["turns"] == 2 and found == json.loads((caller / "evaluation.json").read_text())
    status, out, err = cli("evaluate", run, "--test")
    assert status == 2 and "nothing was held out for a test" in err and "--test-fraction" in err and out == ""


def test_a_person_sees_a_table_and_the_next_command(run: Path, cli) -> None:
    status, out, err = cli("evaluate", run, "--checkpoint", "step-000002", "--generate", 2, "--limit", 40)
    assert status == 0 and f"next: mlx-finetune report {run}" in err and "tuned: answers 100 %" in err
    for said in (
        "inside a call",
        "95 % range",
        "valid call",
        "0 of 2 (0 %)",
        "lower is better",
        "Only 2 conversations",
        "OpenAssistant",
    ):
        assert said in out
    assert out.splitlines()[-1] == str(run / "evaluation.json")
    found = json.loads((run / "evaluation.json").read_text())
    assert (found["checkpoint"], found["step"], found["engine"], found["split"]) == ("step-000002", 2, "mlx", "valid")
    assert found["bootstrap"] == {"samples": 2000, "seed": 0, "unit": "conversation"} and found["gptme_eval"] is None
    assert f"({math.exp(found['rows'][0]['base']):.4g})" in out
    assert found["rows"][0].keys() >= {"group", "name", "tokens", "conversations", "base", "tuned", "difference", "low", "high"}


def test_a_model_is_measured_alone_as_the_base_of_a_run_is(run: Path, cli) -> None:
    base = run.parent / "base"
    alone = measure_model(base, run.parent / "dataset", "mlx")
    assert alone.tuned is None and alone.base.loss == pytest.approx(compare(run, "step-000004")[0].base.loss, abs=1e-6)
    status, out, _ = cli("evaluate", base, "--data", run.parent / "dataset", "--engine", "mlx", "--generate", 2, "--limit", 40)
    assert status == 0 and "tuned" not in out and "valid call" in out and not (base / "evaluation.json").exists()
    assert cli("evaluate", base)[2].startswith(f"error: {base}: a model, not a run")
    assert "a run has its own data" in cli("evaluate", run, "--data", run.parent / "dataset")[2]
    assert "--checkpoint is of a run" in cli("evaluate", base, "--data", run.parent / "dataset", "--checkpoint", "step-000002")[2]


def test_a_damaged_evaluation_is_one_line_before_anything_is_measured(run: Path, cli) -> None:
    path = run / "evaluation.json"
    for damaged, said in (("garbage", "not JSON"), ("[]", "not what evaluate"), ('{"gptme_eval": 5}', "not what evaluate")):
        path.write_text(damaged)
        status, _, err = cli("evaluate", run, "--checkpoint", "step-000004", "--generate", 0)
        assert status == 2 and said in err and "losses 100 %" not in err and path.read_text() == damaged
    path.unlink()


def test_data_whose_messages_are_gone_or_cut_is_refused_in_one_line(caller: Path, tmp_path: Path) -> None:
    config, model, _ = open_run(caller, "latest")
    dataset = Dataset.open(Path(config.data))
    path = dataset.folder / "valid.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    try:
        path.write_text("".join(lines[:-1]))
        with pytest.raises(UserError, match=f"{len(lines) - 1} lines for {len(lines)} examples"):
            Material.of(dataset, model, 8, Wanted())
        path.unlink()
        with pytest.raises(UserError, match="No such file"):
            Material.of(dataset, model, 8, Wanted())
    finally:
        path.write_text("".join(lines))


def test_the_engine_is_given_back_tuned(run: Path) -> None:
    comparison, engine = compare(run, "step-000004")
    config, model, checkpoint = open_run(run, "step-000004")
    fresh = open_tuned(config, model, Dataset.open(Path(config.data)), checkpoint)
    assert all(np.array_equal(value, engine.state()[name]) for name, value in fresh.state().items())
    assert comparison.checkpoint == "step-000004"
