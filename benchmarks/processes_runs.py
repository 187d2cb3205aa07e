"""What processes.py measures: runs of the command line in one process and in two, and what a killed process leaves."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from safetensors import safe_open
from tables import Figures

from mlx_finetune.terminal import one_line
from mlx_finetune.training.metrics import read_metrics

STEPS, SAVE_EVERY = 8, 2
SHAPE: Figures = {"steps": STEPS, "batch_size": 2, "gradient_accumulation": 4, "rank": 4, "alpha": 8, "dropout": 0.1}
SHAPE |= {"learning_rate": 1e-3, "eval_every": 4, "save_every": SAVE_EVERY, "dtype": "float32", "sample_prompts": 0}
BIN = Path(sys.executable).parent
MODULE = ("-m", "mlx_finetune")
PROGRAM = str(Path(__file__).with_name("processes_program.py"))
SLOW = 2.0  # seconds that a checkpoint takes longer, where that is asked for
LIMIT = 120.0  # seconds that anything may take
BEHIND = 2.0  # for which a process is stopped before it is killed: the other is then waiting for it, as for a slower one
GONE = "error: another process of this run is gone"
RANK = {"torch": "RANK", "mlx": "MLX_RANK"}  # in the environment of each process
EXITS = (r"rank +: (\d+) .*\n +exitcode +: (-?\d+)", r"rank (\d+) exited with code (-?\d+)")  # torchrun's words, mlx.launch's


@dataclass(frozen=True)
class Kind:
    """A way to train in two processes."""

    name: str
    engine: str
    apart: tuple[str, ...] = ()  # settings of two processes that one process does not have
    alone: tuple[str, ...] = ()  # what takes them back


KINDS = (
    Kind("torch, gloo", "torch"),
    Kind("torch, gloo, fsdp", "torch", ("fsdp=true",), ("fsdp=false",)),
    Kind("mlx, ring", "mlx"),
)


@dataclass(frozen=True)
class Place:
    """Where the model, the data and the runs are."""

    model: Path
    data: Path
    folder: Path

    def begin(self, kind: Kind, processes: int, name: str) -> tuple[Path, list[str]]:
        """The folder of a new run, and the arguments that start it."""
        run, extra = self.folder / name, kind.apart if processes > 1 else ()
        words = ["train", "--model", str(self.model), "--data", str(self.data), "--out", str(run), "--engine", kind.engine]
        settings = [*(f"{key}={value}" for key, value in SHAPE.items()), *extra]
        return run, [*words, *(word for setting in settings for word in ("--set", setting))]


def go_on(kind: Kind, processes: int, run: Path) -> list[str]:
    """The arguments that run on what is there."""
    extra = kind.apart if processes > 1 else kind.alone
    return ["train", "--resume", "--out", str(run), *(word for setting in extra for word in ("--set", setting))]


def command(kind: Kind, processes: int, program: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """A whole command line; `program`: what python runs."""
    if processes == 1:
        return [sys.executable, *program, *arguments]
    if kind.engine == "torch":
        return [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(processes), *program, *arguments]
    launch = [str(BIN / "mlx.launch"), "-n", str(processes), "--backend", "ring", "--starting-port", str(_free_port())]
    return [*launch, "--", sys.executable, *program, *arguments]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return min(int(one.getsockname()[1]), 65000)


class Started:
    """A command that runs, its output in a file."""

    def __init__(self, kind: Kind, processes: int, line: Sequence[str], log: Path) -> None:
        self.kind, self.processes, self.line, self.log = kind, processes, " ".join(line), log
        self.ranks: dict[int, psutil.Process] = {}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        with log.open("w", encoding="utf-8") as file:  # stdin stays open: mlx.launch reads it without a pause where it is not
            self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment)

    def wait(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Until it ends, or `until` says so: whether it did. Ends the process, and fails, where it takes too long."""
        began = time.perf_counter()
        while self.process.poll() is None and not until():
            if time.perf_counter() - began > LIMIT:
                self.end()
                raise TimeoutError(f"{self.line}: not done in {LIMIT:.0f} s\n{self.said()}")
            if self.processes > 1 and len(self.ranks) < self.processes:
                self._look_for_ranks()
            time.sleep(0.01)
        return self.process.poll() is None

    def _look_for_ranks(self) -> None:
        """The processes by their rank; then mlx.launch, two of whose threads never rest, takes only what nobody else wants."""
        try:
            launcher = psutil.Process(self.process.pid)
            for child in launcher.children(recursive=True):
                if (rank := child.environ().get(RANK[self.kind.engine])) and "train" in child.cmdline():
                    self.ranks[int(rank)] = child
            if len(self.ranks) == self.processes and self.kind.engine == "mlx" and sys.platform == "linux":
                for thread in launcher.threads():
                    os.setpriority(os.PRIO_PROCESS, thread.id, 19)
        except (psutil.Error, ProcessLookupError):
            self.ranks.clear()  # it ends, or has not begun: the next look tells

    def end(self) -> None:
        """All of it, at once."""
        for rank in self.ranks.values():
            rank.kill()
        self.process.kill()
        self.process.wait()

    def said(self) -> str:
        """All output so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def do(kind: Kind, processes: int, program: Sequence[str], arguments: Sequence[str], log: Path) -> None:
    """A command to its end; fails with what it said where it fails."""
    started = Started(kind, processes, command(kind, processes, program, arguments), log)
    started.wait()
    if started.process.returncode or "exited with code" in started.said():  # mlx.launch ends with 0 whatever happens
        raise RuntimeError(f"{started.line}: exit status {started.process.returncode}\n{started.said()}")


def half(run: Path, copy: Path) -> Path:
    """The run as a crash behind half of its steps leaves it."""
    shutil.copytree(run, copy, symlinks=True)
    for number in range(STEPS // 2 + 1, STEPS + 1):
        shutil.rmtree(copy / "checkpoints" / f"step-{number:06d}", ignore_errors=True)
    return copy


def summed(run: Path, sizes: Sequence[int]) -> Figures:
    """Of the sums that processes_program.py wrote down, those of the first step."""
    gradient = max(sizes)
    first = sizes.index(gradient)
    step = sizes[first : sizes.index(gradient, first + 1)]
    with safe_open(run / "latest" / "adapter_model.safetensors", "np") as file:
        trained = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118  no mapping
    found: Figures = {"trained numbers": trained, "steps": sizes.count(gradient)}
    found |= {"gradient, bytes": gradient, "loss, bytes": step[1], "whether to stop, bytes": sum(step[2:])}
    return found | {"4 bytes a trained number": gradient == 4 * trained and sizes.count(gradient) == STEPS}


def killed(kind: Kind, rank: int, slow: bool, place: Place) -> tuple[Path, Figures]:
    """A run of which process `rank` is killed behind the first checkpoint, while the other waits for it; and a row."""
    name = f"{kind.name}, process {rank}" + (f", a checkpoint takes {SLOW:g} s longer" if slow else "")
    run, arguments = place.begin(kind, 2, f"{kind.name}-killed-{rank}{'-slow' if slow else ''}")
    program = (PROGRAM, "slow", str(SLOW)) if slow else MODULE
    started = Started(kind, 2, command(kind, 2, program, arguments), place.folder / f"{run.name}.log")
    if not started.wait(lambda: _steps(run) > SAVE_EVERY) or len(started.ranks) != 2:
        raise RuntimeError(f"{started.line}: over before anything was killed\n{started.said()}")
    started.ranks[rank].send_signal(signal.SIGSTOP)
    time.sleep(BEHIND)
    done, began = _steps(run), time.perf_counter()
    started.ranks[rank].kill()
    _, alive = psutil.wait_procs([started.ranks[1 - rank]], timeout=LIMIT)
    seconds = None if alive else time.perf_counter() - began
    if alive:
        started.end()
    started.wait()
    exits = exits_in(started.said())
    row: Figures = {"killed": name, "the other ended after, seconds": seconds}
    row |= {"its exit status": str(exits.get(1 - rank, "?")), "its launcher's": str(started.process.returncode)}
    row |= {"its last line": last_line(started.said()), "it says so": GONE in last_line(started.said())}
    saved = sorted(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*"))
    row |= {"steps done": done, "checkpoints": ", ".join(map(str, saved))}
    return run, row | ({"the last step is saved": saved[-1] == done} if rank else {})


def _steps(run: Path) -> int:
    """Training steps that are in the metrics; 0 before there is a checkpoint."""
    if not (run / "checkpoints" / f"step-{SAVE_EVERY:06d}").exists():
        return 0
    return max(int(row["step"]) for row in read_metrics(run / "metrics.jsonl"))


def exits_in(said: str) -> dict[int, int]:
    """The exit status of each process by its rank, as its launcher says it; below 0: the signal that ended it."""
    return {int(rank): int(code) for form in EXITS for rank, code in re.findall(form, said)}


def last_line(said: str) -> str:
    """What our program says at last, its hint left out; of a traceback the error."""
    ours = re.findall(r"^(?:process \d+: )?error: .*$|^\[rank\d+\]: \w+(?:Error|Exception): .*$", said, re.MULTILINE)
    return one_line(ours[-1], 120) if ours else ""


def sums_in(file: Path) -> list[int]:
    """What processes_program.py wrote."""
    return list(json.loads(file.read_text(encoding="utf-8")))
