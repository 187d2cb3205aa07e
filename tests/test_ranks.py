"""Several processes train what one trains: the same losses, one that writes, and a way on where one is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from short_runs import cut_after, losses, prepared, settings

from mlx_finetune.engines.ranks import Alone, agree, any_of
from mlx_finetune.engines.work import in_step, share_of
from mlx_finetune.errors import UserError
from mlx_finetune.launched import launched, rank_of

PYTHON = Path(sys.executable)
PORT = str(20_000 + 4 * (os.getpid() % 2_000))  # another for each run of the tests
LAUNCHERS = {
    "torch": (str(PYTHON.parent / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "mlx_finetune"),
    "mlx": (
        *(str(PYTHON.parent / "mlx.launch"), "-n", "2", "--backend", "ring", "--starting-port", PORT),
        *("--", str(PYTHON), "-m", "mlx_finetune"),
    ),
}
SAME = 1e-5  # sums of gradients in another order, float32: measured 1e-6


@pytest.fixture(scope="module")
def data(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tiny_llama, tmp_path_factory.mktemp("data"), "ls")


def command(values: dict[str, object], *more: str) -> list[str]:
    named = {name: values.pop(name) for name in ("model", "data", "out", "engine") if name in values}
    options = [text for name, value in named.items() for text in (f"--{name}", str(value))]
    return ["train", *options, *(text for name, value in values.items() for text in ("--set", f"{name}={value}")), *more]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def start(arguments: list[str], engine: str, launcher: bool) -> subprocess.Popen[str]:
    program = LAUNCHERS[engine] if launcher else (str(PYTHON), "-m", "mlx_finetune")
    return subprocess.Popen(
        [*program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return out, err


@pytest.mark.parametrize("engine", [pytest.param("mlx", marks=pytest.mark.long), "torch"])
def test_two_processes_train_what_one_trains_and_go_on_as_one_and_the_other_way_round(
    engine: str, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    def values(name: str, **more: object) -> dict[str, object]:
        shape = {"gradient_accumulation": 3, "dropout": 0.1, "batch_size": 1, "save_every": 4}
        return settings(tiny_llama, data, tmp_path / name, engine, **shape | more)

    def resume(name: str, launcher: bool) -> None:
        metrics = cut_after(tmp_path / name, 4, tmp_path / f"{name}-again") / "metrics.jsonl"
        rows = metrics.read_text().splitlines(keepends=True)
        metrics.write_text("".join(row for row in rows if json.loads(row)["step"] <= 4))
        assert len(losses(metrics.parent, "train")) == 4
        process = start(["train", "--resume", "--out", str(tmp_path / f"{name}-again")], engine, launcher)
        out, err = finished(process)
        assert process.returncode == 0 and out.count(f"10 steps on {engine}") == 1, err

    for name, launcher in (("one", False), ("two", True)):
        out, err = finished(start(command(values(name)), engine, launcher))
        assert out.count(f"10 steps on {engine}") == 1, err  # one of them speaks
    expected = losses(tmp_path / "one", "train"), losses(tmp_path / "one", "valid")
    for name, launcher in (("two", False), ("one", True)):
        resume(name, launcher)
    for name in ("two", "two-again", "one-again"):
        for split, wanted in zip(("train", "valid"), expected, strict=True):
            np.testing.assert_allclose(losses(tmp_path / name, split), wanted, atol=SAME)


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.long)])
def test_weights_cut_over_two_processes_train_what_one_trains(kind: str, tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    more = {"gradient_accumulation": 3, "batch_size": 1, "grad_checkpoint": 1, "fine_tune_type": kind}
    for name, launcher in (("one", False), ("two", True)):
        cut = {"fsdp": "true"} if launcher else {}
        _, err = finished(start(command(settings(tiny_llama, data, tmp_path / name, "torch", **more | cut)), "torch", launcher))
        assert (tmp_path / name / "latest").exists(), err
    for split in ("train", "valid"):
        np.testing.assert_allclose(losses(tmp_path / "two", split), losses(tmp_path / "one", split), atol=SAME)


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("engine", ["mlx", "torch", "fsdp"])
def test_a_process_that_dies_ends_the_run_with_one_line_and_a_checkpoint_to_go_on_from(
    engine: str, lost: int, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    cut = {"fsdp": "true"} if engine == "fsdp" else {}
    engine = "torch" if cut else engine
    values = settings(tiny_llama, data, tmp_path / "run", engine, steps=100_000, eval_every=100_000, **cut)
    process = start(command(values), engine, True)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000005"
    for _ in range(600):
        if checkpoint.exists():
            break
        time.sleep(0.1)
    (victim,) = [pid for pid in children(process.pid) if rank_in(pid) == lost]
    os.kill(victim, signal.SIGKILL)
    _, err = finished(process)
    assert "another process of this run is gone" in err and "RuntimeError" not in err
    ended = int((tmp_path / "run" / "latest").resolve().name.removeprefix("step-"))
    if lost == 1:  # the first lives on and saves all that it has
        assert ended == len(losses(tmp_path / "run", "train"))
    from mlx_finetune.training.run import plan_resume

    assert plan_resume(tmp_path / "run", {"fsdp": False}).checkpoint.name == f"step-{ended:06d}"  # type: ignore[union-attr]


def children(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def rank_in(pid: int) -> int | None:
    try:
        pairs = dict(line.split("=", 1) for line in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in line)
    except OSError:
        return None
    return rank_of(pairs) if "RANK" in pairs or "MLX_RANK" in pairs else None


def test_the_work_of_a_step_is_shared_out_whole_and_evenly_without_a_word() -> None:
    random = np.random.default_rng(0)
    for pieces, ranks in ((8, 2), (7, 3), (2, 4), (1, 2)):
        sizes = random.integers(100, 1000, pieces).tolist()
        shares = [share_of(sizes, rank, ranks) for rank in range(ranks)]
        assert sorted(index for share in shares for index in share) == list(range(pieces))
        assert shares == [share_of(sizes, rank, ranks) for rank in range(ranks)]
        loads = [sum(sizes[i] for i in share) for share in shares]
        assert max(loads) - min(loads) <= max(sizes)
        counts = [in_step(share, sizes, ranks) for share in shares]
        assert len({len(each) for each in counts}) == 1
        assert sorted(i for each in counts for i, counted in each if counted) == list(range(pieces))
    assert share_of([3, 9, 1], 0, 1) == [0, 1, 2]


class Together:
    """What several processes would get, each asked in turn."""

    rank = 0

    def __init__(self, said: list[np.ndarray]) -> None:
        self.size, self._said = len(said), said

    def sum(self, numbers: np.ndarray) -> np.ndarray:
        return numbers if self.size == 1 else np.sum(self._said, axis=0)


def test_processes_that_would_train_different_things_are_stopped() -> None:
    sent: list[np.ndarray] = []

    class Recording(Alone):
        def sum(self, numbers: np.ndarray) -> np.ndarray:
            sent.append(numbers)
            return numbers

    for settings_, data in (("a", "1"), ("a", "1"), ("b", "1")):
        agree(Recording(), settings=settings_, data=data)
    agree(Together(sent[:2]), settings="a", data="1")
    with pytest.raises(UserError, match=r"do not train the same: not the same settings$"):
        agree(Together(sent), settings="a", data="1")
    assert any_of(Together([np.array([0.0]), np.array([1.0])]), False) and not any_of(Alone(), False)


def test_launchers_are_told_by_their_environment() -> None:
    assert (rank_of({}), launched({})) == (0, None)
    assert (rank_of({"RANK": "3", "WORLD_SIZE": "8"}), launched({"RANK": "3", "WORLD_SIZE": "8"})) == (3, "torch")
    assert (rank_of({"MLX_RANK": "1"}), launched({"MLX_RANK": "1"})) == (1, "mlx")
    assert launched({"WORLD_SIZE": "1"}) is launched({"WORLD_SIZE": "all"}) is None


def test_what_only_looks_like_a_launcher_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_finetune.engines.torch.ranks import ranks_of

    monkeypatch.setenv("WORLD_SIZE", "8")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE = 8 in the environment, and no RANK, MASTER_ADDR, MASTER_PORT"):
        ranks_of("cpu")


def test_a_cluster_that_takes_its_machine_back_gets_a_saved_step(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    values = settings(tiny_llama, data, tmp_path / "run", "torch", steps=100_000, eval_every=100_000, save_every=100_000)
    process = start(command(values), "torch", False)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.time() + 120
    while not (metrics.exists() and len(losses(tmp_path / "run", "train")) > 2):
        assert process.poll() is None and time.time() < until, process.communicate()
        time.sleep(0.1)
    process.terminate()
    _, err = finished(process)
    done = len(losses(tmp_path / "run", "train"))
    assert process.returncode == 130 and f"interrupted: step {done} of 100000 is saved" in err
    assert (tmp_path / "run" / "latest").resolve().name == f"step-{done:06d}"


def test_an_engine_under_the_launcher_of_the_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_finetune.engines import choose_engine

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_engine("auto") == "torch"
    with pytest.raises(UserError, match="engine mlx under a launcher of torch"):
        choose_engine("mlx")
