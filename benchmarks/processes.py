"""One process against two: the losses, runs that go on on fewer or more, and what happens where one is killed.

    .venv/bin/python benchmarks/processes.py [--out FOLDER]

The command line itself, under torchrun (gloo, without and with FSDP) and under mlx.launch (ring), on a tiny random Llama and the
embedded sample: 8 steps of 4 micro-batches, dropout 0.1, float32. Takes 6 minutes of two cores, writes processes.md and
processes.json; exit status 1 where a bound is broken.
"""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from processes_runs import KINDS, MODULE, PROGRAM, Kind, Place, do, go_on, half, killed, summed, sums_in
from tables import Figures, Table, distance, run, sample_data
from tiny_models import make_tiny

SAME = 1e-5
SECONDS = 30.0
TOGETHER = """\
Largest difference of any loss, training or held out, from the run in one process. Each process computes its share of the
micro-batches, whose dropout is drawn by their number in the step, so only the sums over them are added in another order: some 1e-7
of a sum in float32, and a few 1e-6 of a loss of 7 after 8 steps."""
SUMMED = """\
What the processes add up in a step: the gradient as one array of float32, the loss (float64 with torch, float32 with MLX), and
whether anyone was asked to stop, counted where they are handed over. What FSDP gathers of the frozen weights comes on top."""
KILLED = """\
A process is stopped (SIGSTOP) behind the third step, with a checkpoint of the second, and killed (SIGKILL) two seconds later,
when the other waits for it. The other is to end with a line that says so, in less than the 30 seconds after which torchrun kills
what does not end by itself, and, where it is the first, to save the last whole step; statuses below 0 are signals, -15 is the
launcher's SIGTERM. "Resumed": what `--resume` in one process makes of it, beside the run in one process, with the bound from
above."""


@dataclass(frozen=True)
class What:
    """Which rows are measured."""

    kinds: Sequence[Kind] = KINDS
    kills: Sequence[tuple[int, bool]] = ((0, False), (1, False), (1, True))  # which process, and whether checkpoints are slow
    moves: bool = True  # runs begun on one number of processes and resumed on another


def measure(folder: Path, what: What = What()) -> list[Table]:
    """All tables, in a scratch folder. What one process does, which is one of two cores, is done last, two at a time."""
    model = make_tiny("llama", folder / "model", tokenizer=True)
    place = Place(model, sample_data(model, folder), folder)
    engines = list(dict.fromkeys(kind.engine for kind in what.kinds))
    runs = at_once([partial(whole, Kind(engine, engine), 1, place) for engine in engines])
    together: list[Figures] = []
    sums: list[Figures] = []
    kills: list[Figures] = []
    later: list[Callable[[], object]] = []
    for kind in what.kinds:
        straight = runs[engines.index(kind.engine)][0]
        two, sizes = whole(kind, 2, place)
        sums.append({"processes": kind.name} | summed(two, sizes))
        together.append({"processes": kind.name, "two against one": distance(straight, two)})
        if what.moves:
            goes_on(together[-1], "one, then two", kind, 2, half(straight, folder / f"{kind.name}-one-two"), straight)
            run = half(two, folder / f"{kind.name}-two-one")
            later.append(partial(goes_on, together[-1], "two, then one", kind, 1, run, straight))
        for rank, slow in what.kills:
            run, row = killed(kind, rank, slow, place)
            kills.append(row)
            later.append(partial(goes_on, row, "resumed, loss off by", kind, 1, run, straight))
    at_once(later)
    return tables(together, sums, kills)


def tables(together: Sequence[Figures], sums: Sequence[Figures], kills: Sequence[Figures]) -> list[Table]:
    """Those that were asked for."""
    bounds = {"the other ended after, seconds": SECONDS, "resumed, loss off by": SAME}
    promised = ("it says so", "the last step is saved")
    made = [
        Table("Losses", TOGETHER, together, dict.fromkeys(("two against one", "one, then two", "two, then one"), SAME)),
        Table("Summed in a step", SUMMED, sums, {}, ("4 bytes a trained number",)),
        Table("A process is killed", KILLED, kills, bounds, promised),
    ]
    return [table for table in made if table.rows]


def at_once(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Commands of one process each, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def whole(kind: Kind, processes: int, place: Place) -> tuple[Path, list[int]]:
    """A run from start to end, and the bytes of each sum over its processes."""
    run, arguments = place.begin(kind, processes, f"{kind.name}-{processes}")
    file = place.folder / f"{run.name}.sums"
    do(kind, processes, [PROGRAM, "sums", str(file)] if processes > 1 else MODULE, arguments, place.folder / f"{run.name}.log")
    return run, sums_in(file) if processes > 1 else []


def goes_on(row: Figures, column: str, kind: Kind, processes: int, run: Path, straight: Path) -> None:
    """Puts into `row` what a run that is resumed in so many processes is off by at the end."""
    do(kind, processes, MODULE, go_on(kind, processes, run), run.parent / f"{run.name}-resumed.log")
    row[column] = distance(straight, run)


if __name__ == "__main__":
    run("processes", str(__doc__), measure)
