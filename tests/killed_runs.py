"""Runs that are killed with SIGKILL at moments seen in their folder, and what must be the same after they have gone on."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mlx_finetune.cli import main
from mlx_finetune.data.conversation import Conversation, Message, write_conversations

MEASURED = ("seconds", "memory")  # of a row of metrics.jsonl: no part of what a run computes
# Imported once, for all of them: a process is killed in what it does, and that takes a second where imports take many.
PRELOADED = [
    "killed_runs",
    "mlx_finetune.engines.mlx.engine",
    "mlx_finetune.engines.torch.engine",
    "mlx_finetune.commands",
    "mlx_finetune.training.run",
]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(PRELOADED)
WAIT = 300  # seconds until a process has come to the moment, on a slow machine


def conversations(count: int = 15) -> list[Conversation]:
    """Made to differ in length and content; two of three from gptme."""
    made = []
    for i in range(count):
        turns = [Message("system", "You are gptme.")]
        for turn in range(i % 3 + 1):
            asked = Message("user", f"list {i} {turn}")
            turns += [asked, Message("assistant", f"```shell\nls -{'l' * (i % 5)} dir{turn}\n```")]
        made.append(Conversation(tuple(turns), "openassistant" if i % 3 == 0 else "gptme", f"log-{i}", "MIT"))
    return made


def make_data(model: Path, root: Path) -> Path:
    """root/dataset, prepared for the model."""
    from mlx_finetune.config import make_config
    from mlx_finetune.data.prepare import prepare
    from mlx_finetune.data.template import ChatTemplate

    write_conversations(root / "gptme.jsonl", conversations())
    told = {"max_length": 512, "valid_fraction": 0.2, "validation_by": "hash", "openassistant_share": 0.6}
    prepare([root / "gptme.jsonl"], ChatTemplate.load(model), make_config(told, "test"), root / "dataset", {})
    return root / "dataset"


def settings(model: Path, data: Path, engine: str, steps: int = 8, **values: Any) -> dict[str, Any]:
    """Dropout, so that its seeds count; a checkpoint at every other step, a held-out loss and an answer too."""
    told = {"model": str(model), "data": str(data), "engine": engine, "steps": steps, "dropout": 0.1, "rank": 4, "alpha": 8}
    told |= {"batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-2, "save_every": 2, "eval_every": 2}
    return told | {"sample_prompts": 1, "sample_tokens": 8} | values


def arguments(run: Path, values: dict[str, Any] | None) -> list[str]:
    """Of `train`, or with no values of `train --resume`."""
    more = ["--resume"] if values is None else [part for n, v in values.items() for part in ("--set", f"{n}={v}")]
    return ["train", "--out", str(run), *more]


def start(run: Path, values: dict[str, Any] | None) -> BaseProcess:
    """`train` in a process of its own, whose stderr stands in RUN.log. What it imports was imported before: see `PRELOADED`."""
    process = _SERVER.Process(target=_main, args=(arguments(run, values), str(log(run))))
    process.start()
    return process


def log(run: Path) -> Path:
    """What the processes of a run said."""
    return run.with_name(f"{run.name}.log")


def _main(arguments: list[str], log: str) -> None:
    with Path(log).open("a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    main(arguments)


def rows(run: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl as it is now, a last line that is half-written left out."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def steps_done(run: Path) -> int:
    """By its metrics."""
    return max((row["step"] for row in rows(run) if row["split"] == "train"), default=0)


def writes(run: Path) -> bool:
    """Whether a checkpoint is half-written now."""
    return any((run / "checkpoints").glob(".step-*"))


def measures(run: Path) -> bool:
    """Whether a held-out loss is due and not yet written."""
    last = (rows(run) or [{"split": "", "step": 1}])[-1]
    return last["split"] == "train" and last["step"] % 2 == 0


def unlinked(run: Path) -> bool:
    """Whether the newest checkpoint is there and `latest` does not point to it yet."""
    newest = max((path.name for path in (run / "checkpoints").glob("step-*")), default="")
    return bool(newest) and (run / "latest").resolve().name != newest


# Moment -> whether it is now, and up to how many seconds later the kill falls.
MOMENTS: dict[str, tuple[Callable[[Path], bool], float]] = {
    "start-up": (lambda run: run.is_dir(), 1.0),
    "step": (lambda run: steps_done(run) > 0, 0.4),
    "writing": (writes, 0.0),
    "writing, later": (writes, 0.01),
    "evaluating": (measures, 0.01),
    "linking": (unlinked, 0.0),
}
# 20 of them, in an order in which the first are different ones.
SHARES = {"start-up": 3, "step": 5, "writing": 4, "writing, later": 2, "evaluating": 4, "linking": 2}
KILLS = [moment for _, moment in sorted((number, moment) for moment, count in SHARES.items() for number in range(count))]


@dataclass(frozen=True)
class Killed:
    """Where the kill fell. `after`: steps that were in the metrics; `checkpoint`: the last one; `torn`: something half-written."""

    moment: str
    after: int
    checkpoint: str
    torn: bool
    seconds: float

    @classmethod
    def of(cls, moment: str, run: Path, began: float) -> "Killed":
        """As the folder is now."""
        checkpoints = run / "checkpoints"
        last = max((path.name for path in checkpoints.glob("step-*")), default="none")
        return cls(moment, steps_done(run), last, any(checkpoints.glob(".*")), round(time.monotonic() - began, 3))


def kill_at(process: BaseProcess, run: Path, moment: str, chance: random.Random, ahead: int = 6) -> Killed | None:
    """Kills the process at that moment, within so many steps from where it is; None where it ended before."""
    is_now, later = MOMENTS[moment]
    before, began = steps_done(run) + chance.randrange(ahead), time.monotonic()
    while process.is_alive() and time.monotonic() - began < WAIT:
        time.sleep(0.0002)  # the process that is waited for needs the processor too
        if is_now(run) and (moment == "start-up" or steps_done(run) > before):
            time.sleep(chance.uniform(0, later))
            process.kill()
            break
    process.join(WAIT)
    if process.exitcode == -signal.SIGKILL:
        return Killed.of(moment, run, began)
    assert process.exitcode == 0, log(run).read_text(encoding="utf-8")
    return None


def finish(run: Path, values: dict[str, Any]) -> None:
    """Goes on to the end; where the kill fell before there was a run, by the same command as before."""
    process = start(run, None if (run / "config.yaml").is_file() else values)
    process.join(WAIT)
    assert process.exitcode == 0, log(run).read_text(encoding="utf-8")


def same(run: Path, straight: Path, names: Sequence[str] = ("metrics.jsonl", "samples.jsonl")) -> list[str]:
    """What differs from the run that nothing interrupted: tensors and `best` of the end, and each row but for what is measured."""
    apart = [name for name in ("latest", "best") if (run / name).readlink() != (straight / name).readlink()]
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        if (run / "latest" / name).read_bytes() != (straight / "latest" / name).read_bytes():
            apart.append(name)
    for name in names:
        if not (run / name).exists() or lines(run / name) != lines(straight / name):
            apart.append(name)
    return apart + [path.name for path in (run / "checkpoints").glob(".*")]


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows without what is measured."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in found]
