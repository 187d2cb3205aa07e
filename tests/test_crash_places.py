"""No room, no right to write, no memory: one line that names the place, and what was saved before stays whole."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from finished_runs import make_base, make_run
from full_disk import need_small_disks, on_small_disk
from killed_runs import same

from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.plot import draw_loss
from mlx_finetune.files import write_bytes, write_json
from mlx_finetune.running.train_stage import finished
from mlx_finetune.training.checkpoint import checkpoint_folder, load_checkpoint
from mlx_finetune.training.checkpoints import last_whole
from mlx_finetune.training.journal import Journal
from mlx_finetune.training.run import execute, plan_resume

TRAIN = [sys.executable, "-m", "mlx_finetune", "train"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its data, and a run on each engine of which two of four steps are done."""
    folder = tmp_path_factory.mktemp("root")
    make_base(folder)
    for engine in ("mlx", "torch"):
        run = make_run(folder, engine, f"{engine}/run")
        shutil.rmtree(checkpoint_folder(run, 4))
        for link in ("latest", "best"):
            (run / link).unlink()
            (run / link).symlink_to("checkpoints/step-000002")
    return folder


def size_of(folder: Path) -> int:
    """Bytes on a disk of pages of 4096."""
    return sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in folder.rglob("*") if not path.is_symlink())


def check_one_line(said: str, place: str, reason: str) -> None:
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and place in errors[0] and reason in errors[0], said
    assert "Traceback" not in said and said.splitlines()[-1].startswith("hint: ")


@pytest.mark.long
@pytest.mark.parametrize("room", [0, 8192, 20_000, 60_000])
def test_on_a_full_disk_the_last_checkpoint_stays_whole_and_the_run_goes_on_elsewhere(
    root: Path, engine_name: str, tmp_path: Path, room: int
) -> None:
    need_small_disks()
    place = tmp_path / "disk"
    command = [*TRAIN, "--resume", "--out", str(place / "run")]
    done = on_small_disk(root / engine_name, place, size_of(root / engine_name) + room, command)
    assert done.returncode == 2, done.stderr
    check_one_line(done.stderr, str(place / "run"), "No space left on device")
    found, damaged = last_whole(place / "run")
    assert found == checkpoint_folder(place / "run", 2) and not damaged and load_checkpoint(found)
    execute(plan_resume(place / "run", {}), lambda done, steps, standing: None)
    assert not [path.name for path in (place / "run" / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.long
def test_a_folder_that_can_only_be_read_is_named_and_can_be_looked_at(root: Path, tmp_path: Path) -> None:
    need_small_disks()
    for number, more in enumerate((["--resume"], ["--model", str(root / "base"), "--data", str(root / "dataset")])):
        place = tmp_path / f"disk{number}"
        out = place / "run" if not number else place / "new"
        done = on_small_disk(root / "torch", place, 1 << 26, [*TRAIN, *more, "--out", str(out)], "ro")
        assert done.returncode == 2, done.stderr
        check_one_line(done.stderr, str(out), "Read-only file system")
    command = [sys.executable, "-m", "mlx_finetune", "plot", str(tmp_path / "disk" / "run")]
    done = on_small_disk(root / "torch", tmp_path / "disk", 1 << 26, command, "ro")
    assert done.returncode == 2
    check_one_line(done.stderr, "loss.png", "Read-only file system")


def limited(size: int) -> None:
    """No file of this process may become larger: what is written beyond is refused, as by a full disk."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


WRITERS = {
    "metrics.jsonl": "Journal(run / 'metrics.jsonl', 0, {}, 'x').append(*({'step': n} for n in range(999)))",
    "loss.png": "draw_loss(run)",
    "a.json": "write_json(run / 'a.json', 'x' * 9999)",
    "a.bin": "write_bytes(run / 'a.bin', b'x' * 9999)",
    "step-000004": "go_on(run)",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits are those of POSIX")
@pytest.mark.parametrize("name", WRITERS)
def test_what_cannot_be_written_whole_is_named_and_leaves_nothing_half_written(root: Path, tmp_path: Path, name: str) -> None:
    run = Path(shutil.copytree(root / "torch" / "run", tmp_path / "run", symlinks=True))
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    program = "\n".join((
        "import sys; from pathlib import Path",
        "sys.path.insert(0, sys.argv[2])",
        "from test_crash_places import *",
        "from mlx_finetune import cli",
        "run = Path(sys.argv[1])",
        "def go_on(run): execute(plan_resume(run, {}), lambda done, steps, standing: None)",
        "cli.app = lambda **_: (limited(8192), " + WRITERS[name] + ")[0]",
        "cli.main()",
    ))  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program, str(run), str(Path(__file__).parent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    check_one_line(done.stderr, name, "File too large")
    if name != "metrics.jsonl":
        after = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
        grown = {Path("metrics.jsonl"), Path(".lock"), Path("config.yaml")}
        assert {n: c for n, c in after.items() if n not in grown} == {n: c for n, c in before.items() if n not in grown}
    assert last_whole(run) == (checkpoint_folder(run, 2), [])


def test_memory_that_is_not_there_for_a_checkpoint_is_one_line(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_finetune.engines.torch.engine import TorchEngine

    run = Path(shutil.copytree(root / "torch" / "run", tmp_path / "run", symlinks=True))
    plan = plan_resume(run, {})

    def no_memory(engine: TorchEngine) -> None:
        raise MemoryError("Unable to allocate 3 GiB for an array")

    monkeypatch.setattr(TorchEngine, "state", no_memory)
    with pytest.raises(UserError, match="step 4: no memory left with batch_size = 2") as refused:
        execute(plan, lambda done, steps, standing: None)
    assert "--resume" in refused.value.hint and last_whole(run) == (checkpoint_folder(run, 2), [])
    monkeypatch.undo()
    execute(plan_resume(run, {}), lambda done, steps, standing: None)


@pytest.mark.parametrize("tried", ["loss_sum", "generate_all"])
def test_a_measurement_that_found_no_memory_is_made_up_for_when_the_run_goes_on(
    tried: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_finetune.engines.torch.engine import TorchEngine

    run, straight = (Path(shutil.copytree(root / "torch" / "run", tmp_path / n, symlinks=True)) for n in ("run", "straight"))
    real = getattr(TorchEngine, tried)

    def full(engine: TorchEngine, *asked: object) -> object:
        if engine.updates == 4:
            raise MemoryError("Unable to allocate 3 GiB for an array")
        return real(engine, *asked)

    asked = {"sample_prompts": 1, "sample_tokens": 4}
    execute(plan_resume(straight, asked), lambda done, steps, standing: None)
    with monkeypatch.context() as patched, pytest.raises(UserError, match="step 4: no memory left") as refused:
        patched.setattr(TorchEngine, tried, full)
        execute(plan_resume(run, asked), lambda done, steps, standing: None)
    assert "--resume" in refused.value.hint and last_whole(run) == (checkpoint_folder(run, 4), [])
    plan = plan_resume(run, {})
    assert finished(plan) == (tried == "generate_all") and finished(plan_resume(straight, {}))
    execute(plan, lambda done, steps, standing: None)
    assert finished(plan_resume(run, {})) and same(run, straight) == []
    assert (run / "best").readlink() == (straight / "best").readlink()


def used(*names: object) -> None:
    """What the programs of these tests take from here."""


used(Journal, draw_loss, write_bytes, write_json, limited)
