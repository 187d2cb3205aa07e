"""A run goes on from its last whole checkpoint, one process at a time, and what is damaged is never taken for whole."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Answer
from finished_runs import as_of_old, make_base, make_run
from killed_runs import same

from mlx_finetune.config import make_config
from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.compare import open_run
from mlx_finetune.training.checkpoint import checkpoint_folder, load_checkpoint
from mlx_finetune.training.lock import LOCK, locked, refuse_running
from mlx_finetune.training.run import execute, plan_resume, plan_run

WEIGHTS, MOMENTS_FILE = "adapter_model.safetensors", "optimizer.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its data and a run of four steps with two checkpoints; nothing in it is changed."""
    folder = tmp_path_factory.mktemp("root")
    make_base(folder)
    make_run(folder, "torch")
    return folder


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(root / "run", tmp_path / "run", symlinks=True))


def go_on(run: Path, **values: object) -> None:
    execute(plan_resume(run, values), lambda done, steps, standing: None)


def altered(path: Path) -> None:
    """One bit of the last number."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def swapped(path: Path) -> None:
    """With the file of the checkpoint before: of the same run, and of the same shapes."""
    shutil.copyfile(path.parent.with_name("step-000002") / path.name, path)


DAMAGES: dict[str, Callable[[Path], None]] = {"altered": altered, "cut": cut, "swapped": swapped, "missing": Path.unlink}
REASONS = {"altered": "other bytes", "cut": "bytes and was saved with", "swapped": "other bytes", "missing": "is missing"}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [WEIGHTS, MOMENTS_FILE, "adapter_config.json"])
def test_a_file_that_is_not_the_one_that_was_saved_is_refused_by_name(run: Path, how: str, name: str) -> None:
    folder = checkpoint_folder(run, 4)
    if name == "adapter_config.json" and how == "swapped":  # it is the same in both
        how = "altered"
    DAMAGES[how](folder / name)
    with pytest.raises(UserError, match=rf"step-000004: not a whole checkpoint: {name}.* {REASONS[how]}"):
        load_checkpoint(folder)
    if name == MOMENTS_FILE:
        assert open_run(run, "step-000004")[2] == folder.resolve()  # whoever hands the adapter on has no need of them
    else:
        with pytest.raises(UserError, match=f"not a whole checkpoint: {name}"):
            open_run(run, "step-000004")


def test_a_manifest_or_progress_that_is_not_the_checkpoints_own_is_refused(run: Path) -> None:
    folder = checkpoint_folder(run, 4)
    for name in ("manifest.json", "progress.json"):
        kept = (folder / name).read_bytes()
        swapped(folder / name)
        with pytest.raises(UserError, match=r"holds other bytes|holds the checkpoint of step 2"):
            load_checkpoint(folder)
        for content in (b"{}", b"[]", b'{"files": {"progress.json": 3}}', kept[:20]):
            (folder / name).write_bytes(content)
            with pytest.raises(UserError, match=rf"{name}.*(not a checkpoint's|not JSON)"):
                load_checkpoint(folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=rf"{name}.*(is missing|no such file)"):
            load_checkpoint(folder)
        (folder / name).write_bytes(kept)
    load_checkpoint(folder)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(run: Path) -> None:
    shutil.rmtree(checkpoint_folder(run, 4))
    shutil.copytree(checkpoint_folder(run, 2), checkpoint_folder(run, 4))
    with pytest.raises(UserError, match="step-000004: holds the checkpoint of step 2"):
        load_checkpoint(checkpoint_folder(run, 4))


def test_a_damaged_last_checkpoint_is_said_aloud_and_the_run_goes_on_from_the_one_before_to_the_same_end(
    root: Path, run: Path, cli: Callable[..., Answer]
) -> None:
    altered(checkpoint_folder(run, 4) / MOMENTS_FILE)
    status, _, said = cli("train", "--resume", "--out", run)
    assert status == 0
    assert "step-000004 is DAMAGED: not a whole checkpoint: optimizer.safetensors holds other bytes than were saved" in said
    assert "kept as step-000004.damaged" in said and "going on from step-000002" in said
    assert same(run, root / "run", ("metrics.jsonl",)) == []
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000004", "step-000004.damaged"]


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew(run: Path) -> None:
    for step in (2, 4):
        cut(checkpoint_folder(run, step) / WEIGHTS)
    with pytest.raises(UserError, match=r"step-000004: .*; and there is no whole checkpoint before it") as refused:
        plan_resume(run, {})
    assert "bring its files back" in refused.value.hint


def test_a_checkpoint_of_a_later_version_is_refused_by_name_and_not_gone_back_behind(run: Path) -> None:
    progress = checkpoint_folder(run, 4) / "progress.json"
    progress.write_text(json.dumps(json.loads(progress.read_text()) | {"format": 3}))
    for read in (lambda: plan_resume(run, {}), lambda: load_checkpoint(progress.parent)):
        with pytest.raises(UserError, match=r"step-000004: a checkpoint of format 3; this version reads formats 1 to 2") as refused:
            read()
        assert refused.value.hint == "update mlx-finetune"


def test_a_checkpoint_of_before_there_was_a_manifest_opens_and_a_cut_one_is_seen(run: Path) -> None:
    for step in (2, 4):
        as_of_old(checkpoint_folder(run, step))
    assert plan_resume(run, {}).checkpoint == checkpoint_folder(run, 4)
    cut(checkpoint_folder(run, 4) / MOMENTS_FILE)
    plan = plan_resume(run, {})
    assert plan.checkpoint == checkpoint_folder(run, 2) and [one.folder.name for one in plan.damaged] == ["step-000004"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(root: Path, run: Path) -> None:
    ours = (
        *(f".{name}.part-abcd1234" for name in ("config.yaml", "metrics.jsonl", "made_from.json", "loss.png")),
        "checkpoints/.step-000008.part-abcd_123/x",
        "checkpoints/.step-000003.part-0000aaaa/x",
    )
    others = (".report.html.part-abcd1234", ".config.yaml.mine", ".config.yaml.original", "mine.txt")
    others += ("checkpoints/.step-mine/x", "checkpoints/step-old/x", "checkpoints/.step-000004.original/x")
    for name in (*ours, *others):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("half")
    (run / ".latest.new").symlink_to("nowhere")
    plan = plan_resume(run, {})
    assert (run / ours[0]).exists()  # nothing is changed before the folder is this process's own
    execute(plan, lambda done, steps, standing: None)
    assert not any(
        (run / name).exists() or ((run / name).parent.name.startswith(".step-0") and (run / name).parent.exists()) for name in ours
    )
    assert all((run / name).read_text() == "half" for name in others) and not (run / ".latest.new").is_symlink()
    assert (run / "latest" / WEIGHTS).read_bytes() == (root / "run" / "latest" / WEIGHTS).read_bytes()


def test_links_are_right_after_a_crash_before_they_were_set(run: Path) -> None:
    right = {name: (run / name).readlink() for name in ("best", "latest")}
    (run / "latest").unlink()
    (run / "best").unlink()
    (run / "best").symlink_to("checkpoints/step-000099")
    go_on(run)
    assert {name: (run / name).readlink() for name in right} == right


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_checkpoints_are_kept_and_those_that_links_point_to(root: Path, tmp_path: Path, keep: int) -> None:
    run = make_run(root, "torch", str(tmp_path / "run"), steps=6, save_every=1, keep=keep, learning_rate=1e-2)
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    newest = {f"step-{step:06d}" for step in range(7 - keep, 7)}
    assert kept == newest | {(run / "best").resolve().name, (run / "latest").resolve().name}
    assert all(load_checkpoint(run / "checkpoints" / name) for name in kept)


def test_how_many_are_kept_may_change_when_a_run_goes_on_and_a_best_one_stays(run: Path) -> None:
    shutil.rmtree(checkpoint_folder(run, 4))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    low = [line | {"loss": 0.1} if line["split"] == "valid" and line["step"] == 2 else line for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in low))
    go_on(run, keep=1, save_every=1)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert (run / "best").resolve().name == "step-000002"


HOLD = "import sys, time\nfrom pathlib import Path\nfrom mlx_finetune.training.lock import locked\n"
HOLD += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)\n"


def test_a_second_process_on_a_run_is_refused_and_the_lock_falls_with_a_killed_one(run: Path, cli: Callable[..., Answer]) -> None:
    plan = plan_resume(run, {})
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != LOCK}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    try:
        for more in (["--resume", "--out", run], ["--model", "m", "--data", "d", "--out", run]):
            status, _, said = cli("train", *more)
            assert status == 2 and f"error: {run}: another process trains there (process {holder.pid} on " in said
            assert "since 20" in said and "Traceback" not in said
        with pytest.raises(UserError, match="another process trains there"):  # planned before the other began
            execute(plan, lambda done, steps, standing: None)
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != LOCK} == before
        assert open_run(run, "best")[2] and cli("plot", run)[0] == 0
    finally:
        holder.kill()
        holder.communicate()
    refuse_running(run)
    go_on(run)


def test_a_moments_look_at_a_run_keeps_nobody_from_it_and_the_first_process_not_the_others(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = os.open(run / LOCK, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    threading.Timer(0.05, os.close, [handle]).start()
    with locked(run):
        with pytest.raises(UserError, match="another process trains there"):
            plan_resume(run, {})
        monkeypatch.setenv("RANK", "1")
        assert plan_resume(run, {}).checkpoint == checkpoint_folder(run, 4)


def test_a_run_that_another_process_went_on_with_since_is_not_gone_on_with_from_where_it_was(run: Path) -> None:
    shutil.move(checkpoint_folder(run, 4), run.parent / "later")
    plan = plan_resume(run, {})
    shutil.move(run.parent / "later", checkpoint_folder(run, 4))
    with pytest.raises(UserError, match="another process went on with it meanwhile"):
        execute(plan, lambda done, steps, standing: None)


def test_a_folder_that_a_start_left_before_there_was_a_run_serves_the_same_command(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in (LOCK, "made_from.json", ".config.yaml.part-abcd1234"):
        (out / name).write_text("{}")
    with pytest.raises(UserError, match=r"not a run \(no config.yaml\)") as refused:
        plan_resume(out, {})
    assert refused.value.hint == "leave out --resume to start one"
    make_run(root, "torch", str(out), steps=1)
    assert (out / "latest").exists() and json.loads((out / "made_from.json").read_text())["data"]


def test_a_run_whose_model_cannot_be_loaded_leaves_no_folder(root: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(root / "base", tmp_path / "model"))
    told = {"model": str(model), "data": str(root / "dataset"), "out": str(tmp_path / "run"), "engine": "torch", "steps": 1}
    plan = plan_run(make_config(told | {"target_modules": "nothing_of_that_name"}, "test"))
    with pytest.raises(UserError):
        execute(plan, lambda done, steps, standing: None)
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_checkpoint_goes_on_only_with_what_it_began_with(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    made = json.loads((run / "made_from.json").read_text())
    assert made["data"] and made["model"] and made["versions"]["mlx-finetune"] and made["begun"]
    assert plan_resume(run, {}).checkpoint is None
    (run / "made_from.json").write_text(json.dumps(made | {"data": "other"}))
    with pytest.raises(UserError, match="begun with data other, this is"):
        plan_resume(run, {})
