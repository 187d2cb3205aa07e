"""A loss or a gradient that is not finite changes nothing, names its examples, and never lets a run go on for long."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from short_runs import STEPS, conversations, cut_after, prepared, settings, tensors

from mlx_finetune.config import make_config
from mlx_finetune.data.batches import Example
from mlx_finetune.data.conversation import Message, write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.engines import open_engine
from mlx_finetune.errors import UserError
from mlx_finetune.training.loop import IN_A_ROW
from mlx_finetune.training.metrics import read_metrics
from mlx_finetune.training.offenders import KEPT, NAMED, offending_in_step, search
from mlx_finetune.training.run import execute, packed, plan_resume, plan_run
from mlx_finetune.training.schedule import learning_rate

one_by_default = pytest.mark.parametrize("engine_name", [pytest.param("mlx", marks=pytest.mark.long), "torch"])


def quiet(done: int, steps: int, standing: object) -> None:
    """In place of a bar."""


@pytest.fixture(scope="module")
def data(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tiny_llama, tmp_path_factory.mktemp("data"), "ls")


def only_in_one(dataset: Dataset, split: str = "train") -> tuple[int, int]:
    """A token that one example of the split has and nothing else, and the place of that example."""
    held = {name: [set(example.tokens.tolist()) for example in getattr(dataset, name)] for name in ("train", "valid")}
    every = [token for examples in held.values() for tokens in examples for token in tokens]
    found = ((token, place) for place, tokens in enumerate(held[split]) for token in sorted(tokens) if every.count(token) == 1)
    return next(found)


def changed(model: Path, out: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """The model with other weights."""
    shutil.copytree(model, out)
    weights = load_file(out / "model.safetensors")
    change(weights)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def infinite(model: Path, out: Path, token: int) -> Path:
    """The model, whose embedding of one token is infinite: what reads it gives NaN."""
    return changed(model, out, lambda weights: weights["model.embed_tokens.weight"][token].fill(np.inf))


@pytest.fixture(scope="module")
def broken(tiny_llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return infinite(tiny_llama, tmp_path_factory.mktemp("broken") / "model", only_in_one(Dataset.open(data))[0])


@pytest.fixture(scope="module")
def runs(broken: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each engine in which one example gives no finite loss."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name in ("mlx", "torch"):
        plan = plan_run(make_config(settings(broken, data, folder / name, name, dropout=0.1, save_every=3), "test"))
        trained, _ = execute(plan, quiet)
        assert not trained.interrupted and 0 < trained.not_applied < STEPS
        found[name] = plan.run
    return found


def rows_of(run: Path, split: str = "train") -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / "metrics.jsonl") if row["split"] == split]


def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(
    engine_name: str, runs: dict[str, Path], broken: Path, data: Path, tmp_path: Path
) -> None:
    dataset, (_, bad) = Dataset.open(data), only_in_one(Dataset.open(data))
    config = make_config(settings(broken, data, tmp_path, engine_name, dropout=0.1), "test")
    with_it = [step for step in range(STEPS) if any(bad in places for places in dataset.examples_at(step, config))]
    assert [row["step"] for row in rows_of(runs[engine_name]) if not row.get("applied", True)] == [step + 1 for step in with_it]
    engine = open_engine(packed(config, dataset), broken)
    for step in (step for step in range(STEPS) if step not in with_it):
        engine.step(dataset.batches_at(step, config), learning_rate(step, STEPS, config), config.seed + step)
    found, expected = tensors(runs[engine_name], STEPS), engine.state()
    assert all(np.array_equal(found[name], array) for name, array in expected.items() if not name.startswith("adapter/"))
    assert {found[name].tobytes() for name in found if "lora_B" in name and name.startswith("base_model")} == {
        array.tobytes() for name, array in expected.items() if name.startswith("adapter/") and "lora_B" in name
    }
    progress = json.loads((runs[engine_name] / "latest" / "progress.json").read_text())
    assert (progress["step"], progress["updates"]) == (STEPS, STEPS - len(with_it)) and engine.updates == progress["updates"]


@pytest.mark.parametrize("last", [3, pytest.param(6, marks=pytest.mark.long)])
def test_a_run_that_goes_on_after_a_step_that_was_not_applied_is_bit_identical(
    engine_name: str, last: int, runs: dict[str, Path], tmp_path: Path
) -> None:
    resumed = cut_after(runs[engine_name], last, tmp_path / "run")
    before = [row for row in rows_of(resumed) if row["step"] <= last]
    assert not all(row.get("applied", True) for row in before)
    execute(plan_resume(resumed, {}), quiet)
    expected, found = tensors(runs[engine_name], STEPS), tensors(resumed, STEPS)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    timeless = [
        [{n: v for n, v in json.loads(line).items() if n not in ("seconds", "memory")} for line in (run / "metrics.jsonl").open()]
        for run in (runs[engine_name], resumed)
    ]
    assert timeless[0] == timeless[1]


def test_the_row_of_such_a_step_is_json_and_names_the_example_and_nothing_of_its_text(
    engine_name: str, runs: dict[str, Path], data: Path
) -> None:
    dataset, (_, bad) = Dataset.open(data), only_in_one(Dataset.open(data))

    def refuse(word: str) -> None:
        raise AssertionError(word)

    lines = (runs[engine_name] / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    skipped = [row for row in rows if row.get("applied") is False]
    example = dataset.train[bad]
    named = {"row": bad, "conversation": example.conversation, "turns": list(example.turns), "gives": "loss"}
    assert skipped and all(row["offending"] == [named] and row["examples"] in (2, 4) for row in skipped)
    assert all(row["loss"] is None and row["grad_norm"] is None and row["tokens"] > 0 for row in skipped)
    assert all(np.isnan(row["loss"]) for row in rows_of(runs[engine_name]) if row["step"] in [row["step"] for row in skipped])


@one_by_default
def test_a_loss_that_is_finite_with_a_gradient_that_is_not_is_told_as_that(
    engine_name: str, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    dataset, (token, bad) = Dataset.open(data), only_in_one(Dataset.open(data))

    def one_channel(weights: dict[str, np.ndarray]) -> None:
        """What only that token has reaches no weight but the adapters', and those far too loud."""
        weights["model.embed_tokens.weight"][:, 0] = 0
        weights["model.embed_tokens.weight"][token, 0] = 1
        weights["model.layers.0.input_layernorm.weight"][0] = 1e25
        for name in ("q_proj", "k_proj", "v_proj"):
            weights[f"model.layers.0.self_attn.{name}.weight"][:, 0] = 0

    model = changed(tiny_llama, tmp_path / "model", one_channel)
    config = make_config(settings(model, data, tmp_path / "run", engine_name, gradient_accumulation=99), "test")
    engine = open_engine(config, model)
    before, result = engine.state(), engine.step(dataset.batches_at(0, config), 1e-2, 0)
    assert np.isfinite(result.loss) and not result.finite and engine.updates == 0
    found = offending_in_step(engine, dataset, config, 0)
    assert [(one.row, one.gives) for one in found.offenders] == [(bad, "gradient")] and found.examples == len(dataset.train)
    assert all(np.array_equal(before[name], array) for name, array in engine.state().items())


@one_by_default
def test_the_third_in_a_row_ends_the_run_and_the_count_outlives_an_interruption(
    engine_name: str, broken: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(done: int, steps: int, standing: object) -> None:
        if done == IN_A_ROW - 1:
            os.kill(os.getpid(), signal.SIGINT)

    every = settings(broken, data, tmp_path / "run", engine_name, gradient_accumulation=99, save_every=99)
    trained, _ = execute(plan_run(make_config(every, "test")), press)
    assert trained.interrupted and trained.step == trained.not_applied == IN_A_ROW - 1 and trained.tokens_learned == 0
    conversation = Dataset.open(data).train[only_in_one(Dataset.open(data))[1]].conversation
    said = capsys.readouterr().err
    assert said.count("was not applied: loss nan") == IN_A_ROW - 1 and f"not finite alone: conversation {conversation} (row" in said
    for count in (IN_A_ROW, IN_A_ROW + 1):  # who goes on all the same is stopped again at once
        with pytest.raises(UserError, match=f"steps 1 to {count} were not applied, {count} in a row") as error:
            execute(plan_resume(tmp_path / "run", {}), quiet)
        good = (tmp_path / "run" / "latest").resolve()
        assert good.name == f"step-{count:06d}" and str(good) in error.value.hint and "--resume" in error.value.hint
        assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, count + 1))


@one_by_default
def test_weights_that_overflow_end_the_run_and_the_last_good_checkpoint_is_named(
    engine_name: str, tiny_llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def suddenly(step: int, steps: int, config: object) -> float:
        return 1e30 if step == 4 else 1e-3

    monkeypatch.setattr("mlx_finetune.training.loop.learning_rate", suddenly)
    more = {"save_every": 1, "keep": 2, "eval_every": 99, "max_grad_norm": 1e30}
    plan = plan_run(make_config(settings(tiny_llama, data, tmp_path / "run", engine_name, **more), "test"))
    with pytest.raises(UserError, match="steps 6 to 8 were not applied, 3 in a row") as error:
        execute(plan, quiet)
    good = plan.run / "checkpoints" / "step-000004"
    assert good.is_dir() and f"the last good checkpoint is {good};" in error.value.hint
    assert "lower learning_rate" in error.value.hint and f"adapter_path={good}" in error.value.hint
    saved = [load_file(path) for path in plan.run.glob("checkpoints/*/*.safetensors")]
    assert len(saved) > 2 and all(np.isfinite(array).all() for arrays in saved for array in arrays.values())
    assert all(len(row["offending"]) == row["examples"] for row in rows_of(plan.run)[5:])
    fresh = make_config(settings(tiny_llama, data, tmp_path / "again", engine_name, adapter_path=str(good), steps=1), "test")
    monkeypatch.undo()
    assert execute(plan_run(fresh), quiet)[0].not_applied == 0


@one_by_default
def test_a_run_that_goes_on_finds_the_best_among_the_losses_that_are_finite(
    engine_name: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    resumed = cut_after(runs[engine_name], 6, tmp_path / "run")
    lines = [json.loads(line) for line in (resumed / "metrics.jsonl").open()]
    assert [row["step"] for row in lines if row["split"] == "valid"] == [0, 4, 8, 10]
    rows = [row | ({"loss": None} if (row["split"], row["step"]) == ("valid", 4) else {}) for row in lines]
    (resumed / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    execute(plan_resume(resumed, {}), quiet)
    after = {row["step"]: row["loss"] for row in rows_of(resumed, "valid") if row["step"] > 4}
    assert (resumed / "best").resolve().name == f"step-{min(after, key=after.__getitem__):06d}"


def with_a_held_out_word(model: Path, data: Path, folder: Path) -> tuple[Path, int, Example]:
    """Data of which one held-out gptme conversation has a token that no other has; that token, and the example."""
    held = {example.conversation for example in Dataset.open(data).valid if example.source == "gptme"}
    every = conversations(15)
    place = next(i for i, conversation in enumerate(every) if conversation.id in held)
    turns = (*every[place].messages[:-1], Message("assistant", "~"))
    every[place] = replace(every[place], messages=turns)
    write_conversations(folder / "gptme.jsonl", every)
    told = {"max_length": 512, "valid_fraction": 0.2, "validation_by": "hash", "openassistant_share": 0.6}
    prepare([folder / "gptme.jsonl"], ChatTemplate.load(model), make_config(told, "test"), folder / "dataset", {})
    dataset = Dataset.open(folder / "dataset")
    (example,) = (example for example in dataset.valid if example.conversation == every[place].id)
    others = {
        token
        for split in (dataset.train, dataset.valid)
        for one in split
        if one.conversation != example.conversation
        for token in one.tokens.tolist()
    }
    return folder / "dataset", next(token for token in example.tokens.tolist() if token not in others), example


def test_a_search_for_what_is_not_finite_has_a_bound_and_says_what_it_did_not_look_at(data: Path) -> None:
    store, counted = Dataset.open(data).train, KEPT + 36
    bad = search(store, [0] * counted, counted, lambda example: "loss")
    assert bad.every and len(bad.offenders) == KEPT and (bad.looked, bad.examples) == (counted, counted)
    assert bad.to_json()["every"] and "not looked at" not in str(bad)
    some = iter([None, *["loss"] * KEPT])
    found = search(store, [0] * counted, counted, lambda example: next(some))  # type: ignore[arg-type]
    assert not found.every and len(found.offenders) == KEPT and found.looked == KEPT + 1
    assert str(found).endswith(f"; and {KEPT - NAMED} more; {counted - KEPT - 1} more examples were not looked at")
    few = search(store, [0] * counted, 5, lambda example: None)
    assert str(few) == f"each of the first 5 of its {counted} examples alone is finite"
    assert few.to_json() == {"examples": counted, "looked": 5, "every": False, "offending": []}


@one_by_default
def test_a_held_out_loss_that_is_not_finite_is_never_the_best_and_uses_up_patience(
    engine_name: str, tiny_llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    dataset, token, example = with_a_held_out_word(tiny_llama, data, tmp_path / "data")
    model = infinite(tiny_llama, tmp_path / "model", token)
    values = settings(model, dataset, tmp_path / "run", engine_name, eval_every=2, patience=2)
    trained, _ = execute(plan_run(make_config(values, "test")), quiet)
    rows = rows_of(tmp_path / "run", "valid")
    assert [row["step"] for row in rows] == [0, 2, 4] and not np.isfinite([row["loss"] for row in rows]).any()
    assert np.isfinite([row["by_source"]["openassistant"] for row in rows]).all()
    assert trained.stopped_early and (trained.step, trained.not_applied) == (4, 0)
    assert not (tmp_path / "run" / "best").exists() and (tmp_path / "run" / "latest").exists()
    said = capsys.readouterr().err
    assert f"the held-out loss of gptme is not finite; not finite alone: conversation {example.conversation} (row" in said


@pytest.mark.long
def test_a_gradient_that_float16_cannot_hold_is_not_applied_and_the_hint_names_a_wider_dtype(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    def loud(weights: dict[str, np.ndarray]) -> None:
        """Small states behind a strong norm: the gradient of that is beyond 65,504."""
        for name in weights:
            if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
                weights[name] *= 1e-4
        weights["model.norm.weight"] *= 300

    model = changed(tiny_llama, tmp_path / "model", loud)
    values = settings(model, data, tmp_path / "run", "torch", dtype="float16", sample_prompts=0)
    with pytest.raises(UserError, match="3 in a row") as error:
        execute(plan_run(make_config(values, "test")), quiet)
    assert "--set dtype=float32" in error.value.hint
    assert {one["gives"] for row in rows_of(tmp_path / "run") for one in row["offending"]} == {"gradient"}
    assert all(np.isfinite(row["loss"]) and np.isnan(row["grad_norm"]) for row in rows_of(tmp_path / "run"))
    trained, _ = execute(plan_resume(tmp_path / "run", {"dtype": "float32"}), quiet)
    assert (trained.step, trained.not_applied) == (STEPS, 0)
