"""SmolLM2-135M-Instruct tuned on the embedded sample: losses by kind of token, answers judged by gptme's rules, the real gptme.

    .venv/bin/python benchmarks/driving_gptme.py [--out FOLDER]

Needs .venv/gptme, which scripts/test makes. gptme executes what the models write, in a scratch folder, confined where bwrap or
sandbox-exec is there. Takes 15 minutes of two cores; writes driving_gptme.md and driving_gptme.json; exit status 1 where the loss
inside calls does not fall surely, the share of valid calls does not rise surely, or gptme executed none of its calls.
"""

import json
from pathlib import Path
from typing import Any

from gptme_cli import Session, run_gptme
from tables import Table, run, sample_data

from mlx_finetune.config import make_config
from mlx_finetune.evaluation.compare import compare
from mlx_finetune.evaluation.wanted import Wanted
from mlx_finetune.files import read_json
from mlx_finetune.models.gguf import find_smollm2, gguf_to_hugging_face
from mlx_finetune.serving.listening import in_background
from mlx_finetune.serving.opened import Opened, find_source
from mlx_finetune.serving.served import OF_BASE, Served
from mlx_finetune.training.run import execute, plan_run

GPTME = Path(__file__).parents[1] / ".venv" / "gptme" / "bin" / "gptme"
SETTINGS: dict[str, Any] = {"engine": "torch", "rank": 16, "alpha": 32, "learning_rate": 1e-3, "batch_size": 1, "epochs": 2}
SETTINGS |= {"gradient_accumulation": 2, "eval_every": 19, "save_every": 19, "sample_prompts": 2, "sample_tokens": 64}
WANTED = Wanted(generate=32, limit=256)
TASKS = ("list the files here", "write fizz.py, a FizzBuzz from 1 to 15, and run it")
STEPS, TOKENS, SECONDS = 6, 256, 300  # of one session: answers in a row, tokens of each, and time
LOSSES = """\
Nats a learned token of the three newest conversations, which nobody trained on; `low` and `high`: 95 % range of the difference by a
paired bootstrap over conversations. Three are few: the true ranges are wider."""
ANSWERS = """\
Greedy answers to all of their turns, behind the very tokens that stand there in training, at most 256 tokens each: of how many
turns which share is good (docs/driving_gptme.md says what each is)."""
REAL = """\
gptme 0.35.1 with our server and the system prompt of the sample, two tasks: the calls that it found and ran. It stops after six
answers, and reminds a model that has not said `complete` twice."""


def measure(folder: Path) -> list[Table]:
    """Trains, compares, and lets both models drive gptme."""
    model = folder / "smollm2"
    gguf_to_hugging_face(find_smollm2(), model)
    data = sample_data(model, folder, max_length=768, valid_fraction=0.3)
    plan = plan_run(make_config(SETTINGS | {"model": str(model), "data": str(data), "out": str(folder / "run")}, "benchmark"))
    execute(plan, lambda done, steps, standing: None)
    compare(plan.run, "best", "", WANTED)
    found = read_json(plan.run / "evaluation.json")
    return [losses(found), rates(found), Table("the real gptme", REAL, sessions(plan.run, data, folder), promised=(RAN,))]


RAN = "its tuned model's calls ran"
FALLS, RISES = "falls surely", "rises surely"


def losses(found: dict[str, Any]) -> Table:
    """By source, kind of token and kind of turn."""
    rows = []
    for row in found["rows"]:
        shown = {name: row[name] for name in ("tokens", "base", "tuned", "difference", "low", "high")}
        promised = {FALLS: row["high"] < 0} if row["name"] == "inside a call" else {}
        rows.append({"of": row["name"]} | {name: "" if value is None else value for name, value in shown.items()} | promised)
    return Table("losses", LOSSES, rows, promised=(FALLS,))


def rates(found: dict[str, Any]) -> Table:
    """Of answers."""
    rows = []
    for rate in found["generation"]["rates"]:
        promised = {RISES: rate["low"] is not None and rate["low"] > 0} if rate["name"] == "valid call" else {}
        shown = ("of_base", "base", "of_tuned", "tuned", "low", "high")
        rows.append({"of": rate["name"]} | {name: "" if rate[name] is None else rate[name] for name in shown} | promised)
    return Table("answers", ANSWERS, rows, promised=(RISES,))


def sessions(run_folder: Path, data: Path, folder: Path) -> list[dict[str, Any]]:
    """Each task with each model."""
    first = json.loads((data / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    system = next(message["content"] for message in first["messages"] if message["role"] == "system")
    options = ["--tool-format", "markdown", "--system", system, "--tools", "shell,ipython,save,append,patch,complete"]
    served, rows, ran = Served(find_source(str(run_folder), "best", ""), "smollm2", TOKENS), [], 0
    with in_background(served, lambda: Opened(served.source)) as url:
        for number, task in enumerate(TASKS):
            for name in (served.name + OF_BASE, served.name):
                session = run_gptme(GPTME, url, name, [task], options, folder / f"{name}-{number}", SECONDS, STEPS)
                ran += len(session.executed) if name == served.name else 0
                rows.append({"task": task, "model": name} | told(session))
    return [*rows, {"task": "all", RAN: ran > 0}]


def told(session: Session) -> dict[str, Any]:
    """What gptme did."""
    answers = sum(message["role"] == "assistant" for message in session.log)
    return {"answers": answers, "calls that ran": len(session.executed), "the first": (session.executed or [""])[0]}


if __name__ == "__main__":
    run("driving_gptme", str(__doc__), measure)
