"""What a run that moves between the engines, or starts from an adapter of peft or mlx-lm, is off by.

    .venv/bin/python benchmarks/portability.py [--out FOLDER]

Ten steps of each kind of run on a tiny random Llama in float32, begun on one engine, run on from step 5 on the other, in both
directions, and on the same; the first held-out loss of runs that start from an adapter made elsewhere. Takes 3 minutes of two
cores, writes portability.md and portability.json; exit status 1 where a bound is broken.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import portability_runs as runs
from short_runs import prepared
from tables import Table, each, run
from test_portable import BETWEEN, KINDS, PEFT
from tiny_models import make_tiny

START = 1e-5  # of a loss, as a share
MOVED = """\
Ten steps with warmup, rates of 1e-3 or 1e-2, two micro-batches of two rows; the checkpoint of step 5 is run on by the other
engine. Largest difference of any later loss from that of the run that stayed. Checkpoints hold float32 as it is and the data's
order is a function of the step, so only five steps' sums in another order remain, measured 2e-6 of a loss of 6 when the bound was
set."""
STAYED = "The same run, its checkpoint of step 5 run on by the engine that wrote it: exact."
STARTED = """\
Adapters with B other than zero, given as adapter_path. "Loss by peft": held-out loss that peft's own layers give with the adapter
as it loads it (one of mlx-lm: its matrices transposed, and alpha = scale * rank), "off by": what the first held-out loss of a run
differs from it, as a share; one pass in float32 by other kernels, where the head adds 64 terms and the loss some hundred
tokens."""


@dataclass(frozen=True)
class What:
    """Which rows are measured."""

    kinds: Sequence[str] = tuple(KINDS)
    peft: Sequence[str] = tuple(PEFT)
    mlx_lm: Sequence[str] = runs.KINDS_OF_MLX_LM
    workers: int = 2  # processes


def measure(folder: Path, what: What = What()) -> list[Table]:
    """All tables, in a scratch folder."""
    model = make_tiny("llama", folder / "model", tokenizer=True)
    (folder / "prepared").mkdir()
    data = prepared(model, folder / "prepared", "ls")
    jobs: list[tuple[Any, ...]] = [("moved", kind, model, data, folder / f"moved-{i}") for i, kind in enumerate(what.kinds)]
    adapters = [("peft", kind) for kind in what.peft] + [("mlx-lm", kind) for kind in what.mlx_lm]
    jobs += [("started", *adapter, model, data, folder / f"started-{i}") for i, adapter in enumerate(adapters)]
    results = each(call, jobs, what.workers)
    moved = [result for job, result in zip(jobs, results, strict=True) if job[0] == "moved"]
    same, losses = ("losses bit-identical", "all arrays bit-identical"), ("training loss", "held-out loss")
    return [
        Table("Moved to the other engine", MOVED, [row for rows, _ in moved for row in rows], dict.fromkeys(losses, BETWEEN)),
        Table("Resumed on the same engine", STAYED, [row for _, rows in moved for row in rows], {}, same),
        Table(
            "Started from an adapter made elsewhere",
            STARTED,
            results[len(moved) :],
            dict.fromkeys(("mlx off by", "torch off by", "mlx-lm off by"), START),
        ),
    ]


def call(job: tuple[Any, ...]) -> Any:
    """A function of portability_runs.py by its name, in whichever process."""
    print(*(word for word in job if isinstance(word, str)), file=sys.stderr)
    return getattr(runs, job[0])(*job[1:])


if __name__ == "__main__":
    run("portability", str(__doc__), measure)
