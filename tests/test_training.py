"""The loop: resuming is exact, checkpoints move between engines, and what was held out never moves training."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from finished_runs import as_of_old
from short_runs import STEPS, cut_after, losses, prepared, run, settings, tensors

from mlx_finetune.config import make_config
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.engines import open_engine
from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.compare import compare, open_run
from mlx_finetune.evaluation.plot import shown_apart
from mlx_finetune.training import loop
from mlx_finetune.training.ahead import ahead
from mlx_finetune.training.checkpoint import load_checkpoint
from mlx_finetune.training.checkpoints import last_checkpoint
from mlx_finetune.training.held_out import held_out_loss
from mlx_finetune.training.metrics import read_metrics
from mlx_finetune.training.run import execute, plan_resume, plan_run


@pytest.fixture(scope="module")
def data(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tiny_llama, tmp_path_factory.mktemp("data"), "ls")


@pytest.fixture(scope="module")
def straight(tiny_llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An uninterrupted run of each engine, with dropout, so that its seeds count too."""
    folder = tmp_path_factory.mktemp("straight")
    return {name: run(settings(tiny_llama, data, folder / name, name, dropout=0.1)) for name in ("mlx", "torch")}


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    engine_name: str, straight: dict[str, Path], tmp_path: Path
) -> None:
    resumed = cut_after(straight[engine_name], 5, tmp_path / "run")
    plan = plan_resume(resumed, {})
    assert plan.checkpoint and plan.checkpoint.name == "step-000005"
    execute(plan, lambda done, steps, note: None)
    expected, found = tensors(straight[engine_name], STEPS), tensors(resumed, STEPS)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert losses(resumed, "train") == losses(straight[engine_name], "train")
    assert losses(resumed, "valid") == losses(straight[engine_name], "valid")


@pytest.mark.parametrize(("first", "then"), [("mlx", "torch"), ("torch", "mlx")])
def test_a_checkpoint_moves_between_engines(first: str, then: str, tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    whole = run(settings(tiny_llama, data, tmp_path / "whole", first))
    moved = cut_after(whole, 5, tmp_path / "moved")
    execute(plan_resume(moved, {"engine": then}), lambda done, steps, note: None)
    # Two engines in float32, five steps apart: measured 1e-6.
    np.testing.assert_allclose(losses(moved, "train"), losses(whole, "train"), atol=1e-5)
    assert json.loads((moved / "latest" / "progress.json").read_text())["engine"] == then


def test_a_run_falls_in_loss_and_leaves_what_the_contract_names(engine_name: str, straight: dict[str, Path]) -> None:
    folder = straight[engine_name]
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "made_from.json", "chat_template.jinja", "metrics.jsonl", "checkpoints", "latest", "best", ".lock")
    }
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())][-1] == "step-000010"
    names = {path.name for path in (folder / "latest").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "progress.json", "manifest.json"}
    valid = losses(folder, "valid")
    assert len(valid) == 4 and valid[-1] < valid[0] - 0.5
    best = json.loads((folder / "best" / "progress.json").read_text())["step"]
    at = {row["step"]: row["loss"] for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "valid"}
    assert at[best] == min(loss for step, loss in at.items() if step)


def test_how_often_one_looks_does_not_change_the_run(engine_name: str, tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    often = run(settings(tiny_llama, data, tmp_path / "often", engine_name, dropout=0.1, eval_every=1, save_every=1))
    never = run(settings(tiny_llama, data, tmp_path / "never", engine_name, dropout=0.1, eval_every=99, save_every=99))
    assert all(np.array_equal(a, b) for a, b in zip(tensors(often, STEPS).values(), tensors(never, STEPS).values(), strict=True))


def test_both_engines_log_the_same_run(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    runs = {name: run(settings(tiny_llama, data, tmp_path / name, name)) for name in ("mlx", "torch")}
    np.testing.assert_allclose(losses(runs["mlx"], "train"), losses(runs["torch"], "train"), atol=1e-5)
    np.testing.assert_allclose(losses(runs["mlx"], "valid"), losses(runs["torch"], "valid"), atol=1e-5)


def test_peft_opens_the_checkpoint_as_it_is_and_computes_what_the_engine_does(
    engine_name: str, straight: dict[str, Path], tiny_llama: Path, data: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dataset = Dataset.open(data)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), straight[engine_name] / "latest"
    )
    logged = read_metrics(straight[engine_name] / "metrics.jsonl")[-1]
    for source, batches in dataset.held_out(2).items():
        total = 0.0
        for batch in batches:
            with torch.no_grad():
                logits = model(torch.from_numpy(batch.inputs).long()).logits
            targets = torch.from_numpy(batch.targets).long()
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            total += float((nll * torch.from_numpy(batch.weights)).sum())
        loss = total / sum(batch.learned for batch in batches)
        assert loss == pytest.approx(logged["by_source"][source], abs=1e-5)
    assert logged["by_source"].keys() == {"gptme", "openassistant"} and logged["loss"] == logged["by_source"]["gptme"]


def test_the_held_out_loss_is_that_of_ones_own_conversations_and_openassistant_stands_beside_it(
    engine_name: str, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    engine = open_engine(make_config(settings(tiny_llama, data, tmp_path, engine_name), "test"), tiny_llama)
    batches = Dataset.open(data).held_out(2)
    chat = {"chat": batches["openassistant"], "gptme": batches["gptme"]}
    both, apart = held_out_loss(engine, batches), held_out_loss(engine, {"openassistant": batches["openassistant"]})
    own, mixed = held_out_loss(engine, {"gptme": batches["gptme"]}), held_out_loss(engine, chat)
    assert both.loss == own.loss == both.by_source["gptme"] != apart.loss
    assert both.by_source["openassistant"] == apart.loss == apart.by_source["openassistant"]
    assert both.tokens == own.tokens and both.tokens_by_source == {"gptme": own.tokens, "openassistant": apart.tokens}
    assert mixed.tokens == own.tokens + apart.tokens
    assert min(own.loss, apart.loss) < mixed.loss < max(own.loss, apart.loss)


def test_a_comparison_names_each_source_and_judges_by_ones_own(straight: dict[str, Path]) -> None:
    for name, folder in straight.items():
        comparison, _ = compare(folder, "best", name)
        for measured in (comparison.base, comparison.tuned):
            assert measured.by_source.keys() == {"gptme", "openassistant"}
            assert measured.loss == measured.by_source["gptme"]
        (folder / "evaluation.json").unlink()


def test_a_picture_shows_openassistant_beside_the_held_out_loss(straight: dict[str, Path]) -> None:
    valid = [row for row in read_metrics(straight["torch"] / "metrics.jsonl") if row["split"] == "valid"]
    assert shown_apart(valid) == [("openassistant", [0, 4, 8, 10], [row["by_source"]["openassistant"] for row in valid])]
    assert shown_apart([row | {"by_source": {"openassistant": row["loss"]}} for row in valid]) == []
    assert shown_apart([{"step": 0, "loss": 1.0}]) == []


def test_a_run_whose_config_knows_fewer_settings_takes_those_of_its_data(
    straight: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    folder = cut_after(straight["torch"], 5, tmp_path / "run")
    later = ("validation_by", "openassistant_share", "openassistant_valid_fraction", "test_fraction")
    lines = (folder / "config.yaml").read_text().splitlines(keepends=True)
    (folder / "config.yaml").write_text("".join(line for line in lines if not line.startswith(later)))
    less = lambda row: row | {"config": {name: value for name, value in row["config"].items() if name not in later}}  # noqa: E731
    as_of_old(folder / "checkpoints" / "step-000005", less)
    plan = plan_resume(folder, {})
    assert plan.config.openassistant_share == 0.6 and plan.config.validation_by == "hash"
    execute(plan, lambda done, steps, note: None)
    assert losses(folder, "train") == losses(straight["torch"], "train")
    with pytest.raises(UserError, match=r"openassistant_share was 0\.6 in this run, not 0\.1"):
        plan_resume(folder, {"openassistant_share": 0.1})


def test_resume_refuses_other_data_another_model_and_other_settings(
    straight: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    folder = cut_after(straight["torch"], 5, tmp_path / "run")
    (tmp_path / "other").mkdir()
    other = prepared(tiny_llama, tmp_path / "other", "pwd")
    with pytest.raises(UserError, match=r"trained with data .* this is data"):
        plan_resume(folder, {"data": str(other)})
    narrow = make_config({"max_length": 128}, "test")
    prepare([tmp_path / "other" / "gptme.jsonl"], ChatTemplate.load(tiny_llama), narrow, tmp_path / "narrow", {})
    with pytest.raises(UserError, match=r"trained with data .* this is data"):  # not: another max_length
        plan_resume(folder, {"data": str(tmp_path / "narrow")})
    changed = tmp_path / "model"
    shutil.copytree(tiny_llama, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match=r"trained with model .* this is model"):
        plan_resume(folder, {"model": str(changed)})
    with pytest.raises(UserError, match="rank was 4 in this run, not 8"):
        plan_resume(folder, {"rank": 8})
    with pytest.raises(UserError, match="not a run"):
        plan_resume(tmp_path / "nowhere", {})


def test_a_torn_checkpoint_is_never_taken_for_a_whole_one(straight: dict[str, Path], tmp_path: Path) -> None:
    folder = cut_after(straight["torch"], 5, tmp_path / "run")
    half = folder / "checkpoints" / ".step-000008.abcdef"  # as a kill in the middle of writing leaves it
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    found = last_checkpoint(folder)
    assert found and found.name == "step-000005"
    (found / "optimizer.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="not a whole checkpoint"):
        load_checkpoint(found)


def test_the_first_ctrl_c_saves_and_the_run_goes_on_exactly(
    engine_name: str, straight: dict[str, Path], tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    import os
    import signal

    def press(done: int, steps: int, note: str) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    plan = plan_run(make_config(settings(tiny_llama, data, tmp_path / "run", engine_name, dropout=0.1), "test"))
    trained, _ = execute(plan, press)
    assert trained.interrupted and trained.step < STEPS
    found = last_checkpoint(plan.run)
    assert found and found.name == f"step-{trained.step:06d}"
    execute(plan_resume(plan.run, {}), lambda done, steps, note: None)
    expected, resumed = tensors(straight[engine_name], STEPS), tensors(plan.run, STEPS)
    assert all(np.array_equal(expected[name], resumed[name]) for name in expected)


def test_epochs_are_counted_in_whole_data_and_steps_win_over_them(data: Path) -> None:
    dataset = Dataset.open(data)
    shape = {"batch_size": 2, "gradient_accumulation": 2}
    per_epoch = dataset.steps_per_epoch(make_config(shape, "test"))
    assert per_epoch == -(-len(dataset.train) // 4)
    assert loop.total_steps(dataset, make_config(shape | {"epochs": 2}, "test")) == 2 * per_epoch
    assert loop.total_steps(dataset, make_config(shape | {"epochs": 2, "steps": 3}, "test")) == 3


def test_best_is_mended_where_a_crash_fell_before_its_link(straight: dict[str, Path], tmp_path: Path) -> None:
    folder = cut_after(straight["torch"], STEPS, tmp_path / "run")
    right = (folder / "best").readlink()
    (folder / "best").unlink()
    (folder / "best").symlink_to("checkpoints/step-000005")
    execute(plan_resume(folder, {}), lambda done, steps, note: None)
    assert (folder / "best").readlink() == right != Path("checkpoints/step-000005")


def test_a_run_can_be_opened_without_its_data_and_keeps_the_engine_that_it_had(straight: dict[str, Path]) -> None:
    assert {name: open_run(folder, "best")[0].engine for name, folder in straight.items()} == {"mlx": "mlx", "torch": "torch"}


def test_a_config_edited_after_training_is_refused_by_resume_and_evaluate(straight: dict[str, Path], tmp_path: Path) -> None:
    folder = cut_after(straight["torch"], 5, tmp_path / "run")
    (folder / "checkpoints" / "step-old").mkdir()  # a person's own copy is no checkpoint
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("alpha: 8.0", "alpha: 500.0"))
    for read in (lambda: plan_resume(folder, {}), lambda: open_run(folder, "step-000005")):
        with pytest.raises(UserError, match=r"trained with alpha 8\.0, config\.yaml says 500\.0"):
            read()


def test_batches_read_ahead_are_those_of_their_step_in_whatever_order_they_are_asked_for(data: Path) -> None:
    config, dataset = make_config({"batch_size": 2, "gradient_accumulation": 2}, "test"), Dataset.open(data)
    with ahead(dataset, config, 5) as batches:
        for step in (0, 1, 2, 4, 3, 4):
            for one, other in zip(batches.batches_at(step), dataset.batches_at(step, config), strict=True):
                assert np.array_equal(one.inputs, other.inputs) and np.array_equal(one.weights, other.weights)


def test_a_run_stops_with_a_saved_checkpoint_where_memory_runs_short_and_goes_on_exactly(
    engine_name: str, straight: dict[str, Path], tiny_llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_run(make_config(settings(tiny_llama, data, tmp_path / "run", engine_name, dropout=0.1), "test"))
    memory = psutil.virtual_memory()._replace(available=2**20)
    with monkeypatch.context() as patched:
        patched.setattr(psutil, "virtual_memory", lambda: memory)
        trained, _ = execute(plan, lambda done, steps, note: None)
    assert trained.step == 1 and trained.shortage and trained.shortage.startswith("0.0 of ")
    execute(plan_resume(plan.run, {}), lambda done, steps, note: None)
    expected, resumed = tensors(straight[engine_name], STEPS), tensors(plan.run, STEPS)
    assert all(np.array_equal(expected[name], resumed[name]) for name in expected)


def test_a_step_that_gets_no_memory_loses_nothing_of_the_steps_before(
    engine_name: str, straight: dict[str, Path], tiny_llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings(tiny_llama, data, tmp_path / "run", engine_name, dropout=0.1)
    kind = type(open_engine(make_config(values, "test"), tiny_llama))
    original = kind.step

    def step(engine: Any, batches: Any, rate: float, seed: int) -> Any:
        if seed == 7:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(engine, batches, rate, seed)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "step", step)
        with pytest.raises(UserError, match="step 8: no memory left with batch_size = 2, grad_checkpoint = 0") as error:
            execute(plan_run(make_config(values, "test")), lambda done, steps, note: None)
    assert "--set grad_checkpoint=1" in error.value.hint
    found = last_checkpoint(tmp_path / "run")
    assert found and found.name == "step-000007"
    execute(plan_resume(tmp_path / "run", {}), lambda done, steps, note: None)
    expected, resumed = tensors(straight[engine_name], STEPS), tensors(tmp_path / "run", STEPS)
    assert all(np.array_equal(expected[name], resumed[name]) for name in expected)
