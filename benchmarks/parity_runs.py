"""What parity.py measures, one function a figure. Functions that processes of their own call take and give plain values."""

import os
import shutil
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from safetensors.numpy import load_file
from tables import ENGINES, Figures, distance, sample_data
from test_parity import FALLING, STEPS, twenty_steps
from tiny_models import make_tiny

import mlx_finetune.engines.mlx  # noqa: F401  before MLX is imported: its fast BLAS
from mlx_finetune.config import RunConfig, make_config
from mlx_finetune.data.batches import Batch, examples_at
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.engines import open_engine
from mlx_finetune.training.metrics import read_metrics
from mlx_finetune.training.run import execute, plan_resume, plan_run
from mlx_finetune.training.schedule import learning_rate

ROUNDING = 1e-5  # in a weight: beyond it, rounding decided which way a step went
SHAPES = ((1, 1), (2, 2), (3, 4), (7, 1), (1000, 8))  # of steps: examples in a micro-batch, micro-batches


def engines_apart(name: str, model: Path, settings: Figures) -> Figures:
    """Largest differences between the engines after 20 steps of two micro-batches, as a row of a table."""
    (loss, norm, state), (loss_, norm_, state_) = (twenty_steps(engine, model, settings) for engine in ENGINES)
    assert state.keys() == state_.keys()
    apart = [np.abs(state[n] - state_[n]).ravel() for n in state if n.startswith("adapter/")]
    weights = np.concatenate(apart)
    return {
        "setting": name,
        "loss": float(np.abs(loss - loss_).max()),
        "gradient norm, relative": float(np.abs(norm / norm_ - 1).max()),
        "trained weight": float(weights.max()),
        "weights trained": len(weights),
        f"of them off by more than {ROUNDING:.0e}": int((weights > ROUNDING).sum()),
    }


def tiny_apart(name: str, model_type: str, settings: Figures, changes: Figures, folder: Path) -> Figures:
    """`engines_apart` on a tiny random model of an architecture, which is made in `folder`."""
    return engines_apart(name, make_tiny(model_type, folder, tokenizer=False, changes=changes), settings)


def schedule_apart(name: str, model: Path, settings: Figures) -> Figures:
    """`engines_apart` by a schedule, its rates beside it."""
    how = make_config(FALLING | settings, "parity")
    rates = {f"rate in step {step}": learning_rate(step - 1, STEPS, how) for step in (1, 10, 20)}
    row = engines_apart(name, model, settings)
    return {column: row[column] for column in list(row)[:4]} | rates


def real_losses(model: Path, data: Path, out: Path, engine: str, steps: int) -> list[float]:
    """Training losses of a run on a real model."""
    shape = {"rank": 8, "alpha": 16, "batch_size": 1, "gradient_accumulation": 2, "steps": steps, "dtype": "float32"}
    run = trained(make_config(shape | {"model": str(model), "data": str(data), "out": str(out), "engine": engine}, "parity"))
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["split"] == "train"]


def promises(folder: Path) -> tuple[list[Figures], list[Figures], list[Figures]]:
    """Rows on the embedded sample: differences of losses, what a resumed run has, and how often an epoch sees an example."""
    model = make_tiny("llama", folder / "model", tokenizer=True)
    data = sample_data(model, folder)
    straight = {engine: trained(settings_of(model, data, folder / f"{engine}-straight", engine)) for engine in ENGINES}
    differences = {"engine against engine, 20 steps": distance(straight["mlx"], straight["torch"])}
    identical = []
    for engine, other in (ENGINES, ENGINES[::-1]):
        differences[f"4 micro-batches against 1 batch, {engine}"] = accumulation(data, model, engine)
        again = resumed(straight[engine], folder / f"{engine}-again", engine)
        same = distance(straight[engine], again) == 0 and tensors(straight[engine]) == tensors(again)
        identical.append({"engine": engine, "losses, adapter and moments bit-identical": same})
        moved = resumed(straight[engine], folder / f"{engine}-to-{other}", other)
        differences[f"resumed at step 10 on the other engine, {engine} to {other}"] = distance(straight[engine], moved)
    rows: list[Figures] = [{"what": what, "loss": value} for what, value in differences.items()]
    return rows, identical, epochs(Dataset.open(data))


def settings_of(model: Path, data: Path, out: Path, engine: str) -> RunConfig:
    """20 steps of 2 micro-batches with warmup, cosine, decay and clipping."""
    places = {"model": str(model), "data": str(data), "out": str(out), "engine": engine}
    shape = {"rank": 4, "alpha": 8, "learning_rate": 1e-3, "batch_size": 2, "gradient_accumulation": 2}
    when = {"steps": STEPS, "save_every": 10, "eval_every": 10, "sample_prompts": 0}
    return make_config(places | shape | when | {"dtype": "float32"}, "parity")


def trained(config: RunConfig) -> Path:
    """A whole run; gives back its folder."""
    plan = plan_run(config)
    execute(plan, lambda done, steps, note: None)
    return plan.run


def resumed(run: Path, copy: Path, engine: str) -> Path:
    """The run with all after step 10 taken away, and run on by `engine`."""
    shutil.copytree(run, copy, symlinks=True)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:06d}")
    execute(plan_resume(copy, {"engine": engine}), lambda done, steps, note: None)
    return copy


def tensors(run: Path) -> dict[str, bytes]:
    """Every byte of the last checkpoint's adapter and moments."""
    last = run / "checkpoints" / f"step-{STEPS:06d}"
    arrays = load_file(last / "adapter_model.safetensors") | load_file(last / "optimizer.safetensors")
    return {name: array.tobytes() for name, array in arrays.items()}


def accumulation(data: Path, model: Path, engine: str) -> float:
    """Losses and gradient norms of two steps on 4 examples: one by one against all at once."""
    dataset, measured = Dataset.open(data), []
    examples = [dataset.train[i] for i in range(4)]
    for batches in ([Batch.of([example]) for example in examples], [Batch.of(examples)]):
        opened = open_engine(settings_of(model, data, Path("nowhere"), engine), model)
        results = [opened.step(batches, 1e-3, seed=step) for step in range(2)]
        measured.append([number for result in results for number in (result.loss, result.grad_norm)])
    return float(np.ptp(np.array(measured), axis=0).max())


def epochs(dataset: Dataset) -> list[Figures]:
    """How often each example is seen in each of 3 epochs, for several batch shapes, one larger than the data."""
    rows = []
    for batch_size, times in SHAPES:
        per_epoch = dataset.steps_per_epoch(make_config({"batch_size": batch_size, "gradient_accumulation": times}, "parity"))
        counts = []
        for first, end in pairwise(range(0, 4 * per_epoch, per_epoch)):
            steps = (examples_at(dataset.train.lengths, batch_size, times, 0, step) for step in range(first, end))
            counts.append(Counter(i for step in steps for batch in step for i in batch))
        seen = [f"{len(count)}, each {min(count.values())} to {max(count.values())} times" for count in counts]
        row: Figures = {"batch": f"{batch_size} x {times}"}
        row |= {f"examples in epoch {number}": text for number, text in enumerate(seen, 1)}
        rows.append(row | {"each once": all(count == Counter(range(len(dataset.train))) for count in counts)})
    return rows
