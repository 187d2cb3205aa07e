"""Early stopping: at the step that the measured losses say, the same after a kill, and a run that stopped says so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Answer
from finished_runs import as_of_old
from short_runs import cut_after, prepared, settings, tensors
from test_ranks import command, finished
from test_ranks import start as launch

from mlx_finetune.config import make_config
from mlx_finetune.engines.ranks import Alone
from mlx_finetune.training.evaluations import Evaluations
from mlx_finetune.training.loop import Trained
from mlx_finetune.training.metrics import Unwritten, read_metrics
from mlx_finetune.training.patience import out_of_patience
from mlx_finetune.training.run import execute, plan_resume, plan_run

STEPS, EVERY = 8, 2


@pytest.fixture(scope="module")
def data(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tiny_llama, tmp_path_factory.mktemp("data"), "ls")


def unsteady(model: Path, data: Path, out: Path, engine: str, **values: Any) -> dict[str, Any]:
    """Settings with which the held-out loss falls, and once does not, before the run is over."""
    shape = {"steps": STEPS, "learning_rate": 0.1, "lr_schedule": "constant", "eval_every": EVERY, "save_every": 5}
    return settings(model, data, out, engine, **shape | {"warmup_ratio": 0.0} | values)


def start(values: dict[str, Any]) -> Trained:
    return execute(plan_run(make_config(values, "test")), lambda done, steps, standing: None)[0]


def go_on(run: Path, **values: Any) -> Trained:
    return execute(plan_resume(run, values), lambda done, steps, standing: None)[0]


def held_out(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run / "metrics.jsonl") if row["split"] == "valid"]


def without_times(run: Path) -> list[dict[str, Any]]:
    rows = read_metrics(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in ("seconds", "memory")} for row in rows]


@pytest.mark.parametrize(
    ("losses", "patience", "stops"),
    [
        ([3.0, 2.0, 1.0], 1, False),
        ([3.0, 2.0, 2.5], 1, True),
        ([3.0, 2.0, 2.5], 2, False),
        ([3.0, 2.0, 2.5, 2.1], 2, True),
        ([3.0, 2.0, 2.5, 1.9], 2, False),
        ([3.0, 2.0, 2.0, 2.0], 2, True),  # no lower is not enough
        ([3.0, 2.0, 2.5, 2.4, 2.3], 2, True),  # falling again, but not below the lowest
        ([3.0, 4.0, 5.0], 0, False),
        ([2.0, float("nan"), float("nan")], 2, True),
        ([], 1, False),
    ],
)
def test_patience_counts_the_losses_since_the_lowest(losses: list[float], patience: int, stops: bool) -> None:
    assert (out_of_patience([(10 * (i + 1), loss) for i, loss in enumerate(losses)], patience) is not None) == stops


def test_the_reason_names_the_lowest_loss_and_its_step() -> None:
    said = out_of_patience([(10, 3.0), (20, 2.0), (30, 2.5), (40, 2.25)], 2)
    assert said == "the held-out loss was measured 2 times since its lowest, 2.0000 at step 20, and was not lower"


def test_a_run_stops_where_its_losses_say_and_a_killed_one_stops_there_too(
    engine_name: str, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    whole = start(unsteady(tiny_llama, data, tmp_path / "whole", engine_name))
    losses = [loss for step, loss in held_out(tmp_path / "whole") if step]
    first = next(i for i in range(1, len(losses)) if losses[i] >= min(losses[:i]))
    at = EVERY * (first + 1)
    assert at < STEPS and not whole.stopped_early  # else this data shows nothing
    stopped = start(unsteady(tiny_llama, data, tmp_path / "run", engine_name, patience=1))
    assert (stopped.step, stopped.steps, stopped.interrupted) == (at, STEPS, False)
    best = EVERY * (1 + int(np.argmin(losses[: first + 1])))
    assert stopped.stopped_early and f"at step {best}," in stopped.stopped_early
    assert (tmp_path / "run" / "best").resolve().name == f"step-{best:06d}"
    assert (tmp_path / "run" / "latest").resolve().name == f"step-{at:06d}"
    assert without_times(tmp_path / "run") == [row for row in without_times(tmp_path / "whole") if row["step"] <= at]

    killed = cut_after(tmp_path / "run", best, tmp_path / "killed")
    assert go_on(killed).stopped_early == stopped.stopped_early
    assert without_times(killed) == without_times(tmp_path / "run")
    expected, found = tensors(tmp_path / "run", at), tensors(killed, at)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)

    again = go_on(killed)  # it is over still
    assert (again.step, again.stopped_early, again.interrupted) == (at, stopped.stopped_early, False)
    assert again.seconds == 0 and without_times(killed) == without_times(tmp_path / "run")
    on = go_on(killed, patience=99)
    assert (on.step, on.stopped_early) == (STEPS, None)
    assert without_times(killed) == without_times(tmp_path / "whole")
    expected, found = tensors(tmp_path / "whole", STEPS), tensors(killed, STEPS)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_a_run_that_stopped_early_says_why_and_how_to_go_on(
    tiny_llama: Path, data: Path, tmp_path: Path, cli: Callable[..., Answer]
) -> None:
    values = unsteady(tiny_llama, data, tmp_path / "run", "torch")
    options = [f"--{name}={values.pop(name)}" for name in ("model", "data", "out", "engine")]
    settings_ = [text for name, value in values.items() for text in ("--set", f"{name}={value}")]
    status, out, err = cli("train", *options, *settings_, "--patience", 1, "--json")
    told = json.loads(out)
    assert status == 0 and told["step"] < told["steps"] == STEPS and not told["interrupted"]
    assert "measured once since its lowest" in told["stopped_early"]
    assert f"stopped early, at step {told['step']} of {STEPS}: {told['stopped_early']}" in err
    assert f"train --resume --out {tmp_path / 'run'} --set patience=2" in err
    status, out, err = cli("train", "--resume", "--out", tmp_path / "run")
    assert status == 0 and "stopped early, at step" in err and "0 tokens read" in out


class OtherProcess(Alone):
    """A process beside the first, which is told what the first one found."""

    rank = 1  # type: ignore[misc]
    size = 2  # type: ignore[misc]

    def __init__(self, first_says: bool) -> None:
        object.__setattr__(self, "said", float(first_says))

    def sum(self, numbers: np.ndarray) -> np.ndarray:
        return numbers + self.said  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("first_says", [True, False])
def test_every_process_stops_where_the_first_one_does(first_says: bool) -> None:
    class Beside:
        ranks = OtherProcess(first_says)

    look = Evaluations(Beside(), {}, Unwritten(), None, patience=1)  # type: ignore[arg-type]
    assert (look.over() is not None) == first_says


@pytest.mark.long
@pytest.mark.parametrize("engine", ["mlx", "torch", "fsdp"])
def test_two_processes_stop_early_together_and_one_of_them_answers(
    engine: str, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    few = {"patience": 1, "sample_prompts": 2, "sample_tokens": 4, "batch_size": 1} | ({"fsdp": True} if engine == "fsdp" else {})
    values = unsteady(tiny_llama, data, tmp_path / "run", engine.replace("fsdp", "torch"), **few)
    process = launch(command(values), engine.replace("fsdp", "torch"), True)
    out, err = finished(process)
    measured = [step for step, _ in held_out(tmp_path / "run")]
    assert process.returncode == 0 and f"{measured[-1]} steps on" in out, err
    assert 0 < measured[-1] < STEPS and err.count("stopped early, at step") == 1
    path = tmp_path / "run" / "samples.jsonl"
    answered = [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []
    assert answered == ([] if engine == "fsdp" else [step for step in measured for _ in range(2)])
    assert ("no held-out turns are answered on the way" in err) == (engine == "fsdp")


def test_patience_without_anything_held_out_is_said_to_have_no_effect() -> None:
    from mlx_finetune.training.remarks import looks_at_nothing

    assert "patience has no effect" in (looks_at_nothing(make_config({"patience": 2}, "test"), 0) or "")
    assert looks_at_nothing(make_config({"patience": 2}, "test"), 5) is None
    assert "fsdp" in (looks_at_nothing(make_config({"fsdp": True}, "test"), 5) or "")
    assert looks_at_nothing(make_config({"fsdp": True, "sample_prompts": 0}, "test"), 5) is None


def test_a_run_of_an_earlier_version_goes_on_with_patience(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    start(unsteady(tiny_llama, data, tmp_path / "run", "torch", steps=4))
    later = ("patience", "sample_prompts", "sample_tokens", "report_to")
    lines = (tmp_path / "run" / "config.yaml").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "config.yaml").write_text("".join(line for line in lines if not line.startswith(later)))
    for checkpoint in (tmp_path / "run").glob("checkpoints/*"):
        as_of_old(checkpoint, lambda row: row | {"config": {n: value for n, value in row["config"].items() if n not in later}})
    shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=True)
    assert plan_resume(tmp_path / "copy", {"patience": 3}).config.patience == 3
