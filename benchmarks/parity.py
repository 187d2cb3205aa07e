"""How nearly the two engines agree, and how exactly a run resumes.

    .venv/bin/python benchmarks/parity.py [--out FOLDER]

float32. Every setting that both engines have and twelve architectures on tiny random models, the schedules, ten steps of
SmolLM2-135M-Instruct on the embedded sample; resuming, accumulation and epochs. Takes 3 minutes of two cores, writes parity.md
and parity.json; exit status 1 where a bound is broken.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import parity_runs as runs
from tables import ENGINES, Figures, Table, each, run, sample_data
from test_parity import ADAPTER, ARCHITECTURES, LOSS, NEAR_EPSILON, NORM, SETTINGS, TIED, near_epsilon
from tiny_models import make_tiny

from mlx_finetune.models.gguf import find_smollm2, gguf_to_hugging_face

SAME = 1e-5  # of losses
REAL = 1e-3
SCHEDULES: dict[str, Figures] = {
    "cosine": {"lr_schedule": "cosine"},
    "linear": {"lr_schedule": "linear"},
    "constant": {"lr_schedule": "constant"},
    "wsd": {"lr_schedule": "wsd", "decay_ratio": 0.5},
}
EVERY = {"loss": LOSS, "gradient norm, relative": NORM, "trained weight": ADAPTER}
ALIKE = """\
20 steps of two micro-batches of two rows at a rate that falls linearly from 1e-3 to 0, AdamW unless it is said otherwise; the
largest difference in any step (weights: at the end). Both engines begin with the same numbers and add in another order, which is
off by some 1e-7 of a sum in float32: a few 1e-6 of a loss of 6, and as much of a norm. Where a gradient is as small as AdamW's
epsilon, 1e-8, rounding decides how far its weight goes, by up to the rate in a step (seen in qwen2: 1.3e-8 with MLX, 5.5e-9 with
torch, beside a norm of 3.1). B begins at a deviation of .05, since gradients of A are in proportion to it: few are that small. The
last column counts."""
EPSILON = """\
The same with ten times the weights, among them more whose gradients are that small, so one of them may be off by some steps at
the full rate; losses and norms, which hardly depend on such weights, have the bounds from above."""
REALLY = """\
SmolLM2-135M-Instruct, the embedded sample in windows of 512 tokens, batch 1 x 2, LoRA of rank 8 on all linear layers, warmup and
cosine from 2e-4. 30 layers of real width add up more terms than the tiny ones, so the bound is wider: still less than a log of
three decimals shows."""
PROMISES = """\
Tiny Llama, the embedded sample in windows of 512 tokens, warmup, cosine, decay and clipping; some 1e-7 of a sum again. Of
accumulation: losses and gradient norms of two steps."""
EPOCHS = "Examples of the embedded sample, by examples in a micro-batch x micro-batches in a step."


@dataclass(frozen=True)
class What:
    """Which rows are measured."""

    settings: Sequence[str] = tuple(SETTINGS)
    tied: Sequence[str] = TIED
    architectures: Sequence[str] = ARCHITECTURES
    schedules: Sequence[str] = tuple(SCHEDULES)
    real_steps: int = 10  # on SmolLM2; 0: none
    promises: bool = True
    workers: int = 2  # processes


def measure(folder: Path, what: What = What()) -> list[Table]:
    """All tables, in a scratch folder. What takes longest is begun first."""
    llama = make_tiny("llama", folder / "llama", tokenizer=True)
    jobs: list[tuple[Any, ...]] = []
    if what.real_steps:
        model = folder / "smollm2"
        gguf_to_hugging_face(find_smollm2(), model)
        data = sample_data(model, folder / "real", valid_fraction=0.0, openassistant_valid_fraction=0.0)
        jobs += [("real_losses", model, data, folder / f"real-{engine}", engine, what.real_steps) for engine in ENGINES]
    if what.promises:
        jobs.append(("promises", folder / "promises"))
    jobs += [("schedule_apart", name, llama, {"warmup_ratio": 0.2} | SCHEDULES[name]) for name in what.schedules]
    rows: list[tuple[str, str, Figures, Figures]] = [(name, "llama", SETTINGS[name], {}) for name in what.settings]
    rows += [(f"{name}, tied to the head", "llama", SETTINGS[name], {"tie_word_embeddings": True}) for name in what.tied]
    kinds = ("lora", "dora")
    rows += [(f"{model}, {kind}", model, {"fine_tune_type": kind}, {}) for model in what.architectures for kind in kinds]
    jobs += [("tiny_apart", *row, folder / f"tiny-{number}") for number, row in enumerate(rows)]
    return tables(jobs, each(call, jobs, what.workers), {name: settings for name, _, settings, _ in rows})


def call(job: tuple[Any, ...]) -> Any:
    """A function of parity_runs.py by its name, in whichever process."""
    print(*(word for word in job if isinstance(word, str)), file=sys.stderr)
    return getattr(runs, job[0])(*job[1:])


def tables(jobs: Sequence[tuple[Any, ...]], results: Sequence[Any], settings: dict[str, Figures]) -> list[Table]:
    """From what each job gave; those that nobody asked for are left out."""

    def of(name: str) -> list[Any]:
        return [result for job, result in zip(jobs, results, strict=True) if job[0] == name]

    rows = of("tiny_apart")
    loose = [row for row in rows if near_epsilon(settings[row["setting"]])]
    alike = [row for row in rows if row not in loose]
    made = [
        Table("Engine against engine", ALIKE, alike, EVERY),
        Table("Engine against engine, all weights trained with AdamW", EPSILON, loose, EVERY | {"trained weight": NEAR_EPSILON}),
        Table("Engine against engine, by schedule", "Warmup in 4 of 20 steps; otherwise as above.", of("schedule_apart"), EVERY),
        *([real(*of("real_losses"))] if of("real_losses") else []),
    ]
    for differences, identical, epochs in of("promises"):
        made += [
            Table("Losses of runs", PROMISES, differences, {"loss": SAME}),
            Table("Resumed at step 10 of 20 on the same engine", "Exact.", identical, {}, tuple(identical[0])[1:]),
            Table("Epochs", EPOCHS, epochs, {}, ("each once",)),
        ]
    return [table for table in made if table.rows]


def real(ours: Sequence[float], theirs: Sequence[float]) -> Table:
    """Training losses of both engines on a real model."""
    rows = [
        {"step": str(step), "mlx": f"{one:.6f}", "torch": f"{other:.6f}", "difference": abs(one - other)}
        for step, (one, other) in enumerate(zip(ours, theirs, strict=True), 1)
    ]
    return Table("A real model", REALLY, rows, {"difference": REAL})


if __name__ == "__main__":
    run("parity", str(__doc__), measure)
