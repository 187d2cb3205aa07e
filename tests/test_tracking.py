"""Trackers are told the rows of metrics.jsonl and nothing else, once each, also where a run was killed and goes on."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer
from finished_runs import WORDS, make_base, make_run
from short_runs import cut_after

from mlx_finetune.config import RunConfig, load_config, make_config
from mlx_finetune.errors import UserError
from mlx_finetune.installed import versions
from mlx_finetune.training import tracking
from mlx_finetune.training.metrics import Metrics, read_metrics
from mlx_finetune.training.run import execute, plan_resume
from mlx_finetune.training.tracking import check_trackers, identity, told, tracked, values_of, where_it_goes

Points = dict[str, list[tuple[int, float]]]
TRACKERS = ("tensorboard", "trackio", "wandb")


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not versions([name]), reason=f"{name} is not installed: pip install '.[{name}]'")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base/ and dataset/, for runs of four steps that are measured at 0, 2 and 4."""
    folder = tmp_path_factory.mktemp("tracked")
    make_base(folder)
    return folder


def expected(run: Path) -> Points:
    """What a tracker is to show, from metrics.jsonl."""
    points: Points = {}
    for row in read_metrics(run / "metrics.jsonl"):
        for name, value in values_of(row).items():
            points.setdefault(name, []).append((row["step"], value))
    return points


def in_event_files(run: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def as_float32(points: Points) -> dict[str, list[tuple[int, Any]]]:
    return {name: [(step, pytest.approx(value, rel=1e-6)) for step, value in each] for name, each in points.items()}


def config(**values: Any) -> RunConfig:
    return make_config(values, "test")


def test_the_numbers_of_a_row_go_by_their_split() -> None:
    train = {"step": 3, "split": "train", "loss": 2.0, "tokens": 7, "memory": 2**33}
    assert values_of(train) == {"train/loss": 2.0, "train/tokens": 7.0, "train/memory": 2.0**33}
    valid = {"step": 3, "split": "valid", "loss": 1.5, "by_source": {"gptme": 1.5, "openassistant": 3.0}}
    assert values_of(valid) == {"valid/loss": 1.5, "valid/loss/gptme": 1.5, "valid/loss/openassistant": 3.0}


@needs("tensorboard")
def test_tensorboard_shows_exactly_the_rows_of_metrics(engine_name: str, root: Path) -> None:
    run = make_run(root, engine_name, out=f"board-{engine_name}", report_to="tensorboard")
    points = in_event_files(run)
    assert points == as_float32(expected(run))
    assert [step for step, _ in points["valid/loss"]] == [0, 2, 4] and [s for s, _ in points["train/loss"]] == [1, 2, 3, 4]
    assert math.isfinite(points["train/memory"][0][1])


@needs("tensorboard")
def test_a_killed_run_that_goes_on_has_no_step_twice_in_tensorboard_and_none_too_few(root: Path, tmp_path: Path) -> None:
    whole = make_run(root, "torch", out="board", report_to="tensorboard")
    killed = cut_after(whole, 2, tmp_path / "run")
    (killed / "tensorboard" / "events.out.tfevents.1.mine").write_bytes(b"")
    execute(plan_resume(killed, {}), lambda done, steps, standing: None)
    points = in_event_files(killed)
    assert points == as_float32(expected(killed))
    assert points["train/loss"] == in_event_files(whole)["train/loss"]
    assert (killed / "tensorboard" / "events.out.tfevents.1.mine").is_file()  # not ours

    late = cut_after(make_run(root, "torch", out="late"), 2, tmp_path / "late")  # told from the first step on all the same
    execute(plan_resume(late, {"report_to": "tensorboard"}), lambda done, steps, standing: None)
    assert in_event_files(late) == as_float32(expected(late))


@needs("tensorboard")
def test_event_files_stand_on_the_disk_after_each_row_and_need_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from mlx_finetune.training.trackers.tensorboard import begin\n"
        "tracker = begin(Path(sys.argv[1]), {'rank': 4}); tracker.log({'step': 1, 'split': 'train', 'loss': 2.0})\n"
        "print(sorted({'torch', 'tensorflow', 'mlx'} & set(sys.modules)), flush=True); import os; os._exit(0)"
    )
    answer = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n" and in_event_files(tmp_path) == {"train/loss": [(1, 2.0)]}


@needs("trackio")
def test_trackio_shows_exactly_the_rows_of_metrics_also_of_a_run_that_was_killed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import json, sys; from pathlib import Path; from mlx_finetune.training.tracking import IDENTITY, PROJECT\n"
        "from trackio.sqlite_storage import SQLiteStorage as S\n"
        "run = Path(sys.argv[1]); name = run.name + '-' + json.loads((run / IDENTITY).read_text())['id']\n"
        "print(json.dumps([S.get_runs(PROJECT), S.get_logs(PROJECT, name)], default=str))"
    )
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    settings = f"import sys; sys.path[:0] = {sys.path!r}; from finished_runs import make_run; from pathlib import Path\n"
    start = settings + f"make_run(Path({str(root)!r}), 'torch', out='trackio', report_to='trackio')"
    first = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=True)
    assert first.stdout == ""
    run = root / "trackio"
    shutil.rmtree(run / "checkpoints" / "step-000004")  # as a kill after step 3 leaves it
    again = settings + "from mlx_finetune.training.run import execute, plan_resume\n"
    again += f"execute(plan_resume(Path({str(run)!r}), {{}}), lambda *a: None)"
    subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, check=True)
    answer = subprocess.run([sys.executable, "-c", program, str(run)], capture_output=True, text=True, check=True)
    runs, logs = json.loads(answer.stdout.splitlines()[-1])
    assert len(runs) == 1
    points: Points = {}
    for row in logs:
        for name, value in row.items():
            if name not in ("step", "timestamp"):
                points.setdefault(name, []).append((row["step"], value))
    timed = ("train/seconds", "train/memory")  # of a step that was done twice trackio keeps the first
    assert {n: each for n, each in points.items() if n not in timed} == {n: e for n, e in expected(run).items() if n not in timed}
    assert all([step for step, _ in points[name]] == [1, 2, 3, 4] for name in timed)
    assert WORDS not in json.dumps([runs, logs])


@needs("wandb")
def test_wandb_offline_writes_beside_the_run_and_no_conversation_and_nothing_of_the_machine(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("socket.gethostname", lambda: "a-host-of-mine")
    run = make_run(root, "torch", out="wandb-run", report_to="wandb")
    identity = json.loads((run / tracking.IDENTITY).read_text())["id"]
    (folder,) = (run / "wandb").glob(f"offline-run-*-{identity}")
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file() and "logs" not in path.parts)
    for name in ("train/loss", "valid/loss", "learning_rate"):
        assert name.encode() in written
    for private in (WORDS, str(root), "a-host-of-mine"):
        assert private.encode() not in written, private


def test_a_tracker_that_is_not_installed_is_named_before_a_model_is_loaded(
    root: Path, cli: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "versions", lambda packages: {})
    for name in TRACKERS:
        with pytest.raises(UserError, match=f"report_to = {name}: it is not installed") as error:
            check_trackers(config(report_to=name))
        assert error.value.hint == f"pip install 'mlx-finetune[{name}]'"
    places = ["--model", root / "base", "--data", root / "dataset", "--out", "run"]
    status, _, err = cli("train", *places, "--report-to", "wandb", "--dry-run")
    assert status == 2 and "report_to = wandb: it is not installed" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("tensorboard", ("tensorboard",)),
        ("tensorboard, wandb", ("tensorboard", "wandb")),
        (["trackio", "trackio,wandb"], ("trackio", "wandb")),
        ("none", None),
        ("", None),
        (None, None),
        ([], None),
    ],
)
def test_trackers_are_named_by_words_lists_or_commas(asked: Any, found: Any, tmp_path: Path) -> None:
    made = config(report_to=asked)
    assert made.report_to == found
    assert config(**made.to_dict()) == made


def test_an_unknown_tracker_is_refused_with_those_that_there_are() -> None:
    for wrong in ("wadb", "tensorboard,neptune", 5, True, {"a": 1}):
        with pytest.raises(UserError, match="report_to = ") as error:
            config(report_to=wrong)
        assert "wandb" in error.value.message + error.value.hint


def test_what_is_sent_and_where_to_is_said(tmp_path: Path) -> None:
    def said(name: str, **environment: str) -> str:
        (line,) = where_it_goes(config(report_to=name), tmp_path, environment)
        return line

    assert "are SENT to wandb.ai" in said("wandb") and "no conversation" in said("wandb")
    assert "SENT to https://own.example" in said("wandb", WANDB_BASE_URL="https://own.example")
    assert "SENT" not in said("wandb", WANDB_MODE="offline") and "wandb sync" in said("wandb", WANDB_MODE="offline")
    assert "stay on this machine" in said("trackio") and "SENT to me/space" in said("trackio", TRACKIO_SPACE_ID="me/space")
    secret = said("trackio", TRACKIO_SERVER_URL="https://host.example/?write_token=abc")
    assert "SENT to https://host.example/" in secret and "abc" not in secret
    assert "on this machine" in said("tensorboard")
    assert where_it_goes(config(), tmp_path, {}) == []


def test_settings_that_trackers_show_name_no_folder_of_this_machine(tmp_path: Path) -> None:
    places = {name: str(tmp_path / name) for name in ("model", "data", "out", "adapter_path")}
    shown = told(config(**places, rank=4))
    assert str(tmp_path) not in json.dumps(shown) and shown["model"] == "model" and shown["rank"] == 4
    assert told(config(model="org/name"))["model"] == "org/name"


def test_every_tracker_is_told_the_end_also_where_the_run_fails_or_another_cannot_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    class Remembering:
        def __init__(self, name: str) -> None:
            self.name = name

        def log(self, row: dict[str, Any]) -> None:
            raise OSError("disk")

        def finish(self) -> None:
            ended.append(self.name)

    class Module:
        def __init__(self, name: str) -> None:
            self.name = name.rpartition(".")[2]

        def begin(self, run: Path, settings: dict[str, Any]) -> Remembering:
            if self.name == "wandb":
                raise UserError("nobody is logged in")
            return Remembering(self.name)

    monkeypatch.setattr(tracking, "import_module", Module)
    with pytest.raises(OSError, match="disk"), tracked(config(report_to="tensorboard,trackio"), tmp_path) as trackers:
        trackers[0].log({})
    assert ended == ["tensorboard", "trackio"]
    with pytest.raises(UserError, match="logged in"), tracked(config(report_to="trackio,wandb"), tmp_path):
        pass
    assert ended == ["tensorboard", "trackio", "trackio"]


def test_trackers_are_told_the_rows_that_are_kept_before_new_ones(tmp_path: Path) -> None:
    heard: list[int] = []

    class Listening:
        def log(self, row: dict[str, Any]) -> None:
            heard.append(row["step"])

        def finish(self) -> None:
            pass

    rows = [{"step": step, "split": "train", "loss": 1.0, "tokens": 7} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = Metrics(tmp_path / "metrics.jsonl", 2, [Listening()])
    metrics.held_out(3, 1.0, {})
    assert heard == [1, 2, 3] == [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]


def test_report_to_may_change_when_a_run_goes_on_and_is_kept_in_its_config(root: Path, tmp_path: Path) -> None:
    run = cut_after(make_run(root, "torch", out="changes"), 2, tmp_path / "run")
    plan = plan_resume(run, {"report_to": "none", "patience": 4, "sample_prompts": 1, "sample_tokens": 5})
    execute(plan, lambda done, steps, standing: None)
    assert load_config(run / "config.yaml", {}).patience == 4 and load_config(run / "config.yaml", {}).report_to is None


def test_a_damaged_identity_is_one_line(tmp_path: Path) -> None:
    made = identity(tmp_path)
    assert made == identity(tmp_path)
    for damaged in ("[]", '{"id": 5}', "{}"):
        (tmp_path / "tracked.json").write_text(damaged)
        with pytest.raises(UserError, match=r"tracked\.json: no id"):
            identity(tmp_path)
