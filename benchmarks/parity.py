"""How nearly the two engines agree, and how exactly a run resumes: float32, a tiny random Llama, the embedded sample.

    .venv/bin/python benchmarks/parity.py [--out benchmarks/parity.json]

Prints one line a promise, with the measured figure and the bound; exit status 1 where a bound is broken.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from safetensors.numpy import load_file
from tiny_models import make_tiny

from mlx_finetune.config import RunConfig, make_config
from mlx_finetune.data.batches import Batch, examples_at
from mlx_finetune.data.collect import Sources, collect
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.refine import Settings
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.engines import open_engine
from mlx_finetune.training.metrics import read_metrics
from mlx_finetune.training.run import execute, plan_resume, plan_run

ENGINES = ("mlx", "torch")
STEPS = 20
BOUND = 1e-5


def main() -> None:
    """Measures everything and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder))
    print(*(line for line in lines(figures)), sep="\n")
    if arguments.out:
        arguments.out.write_text(json.dumps(machine() | figures, indent=2) + "\n", encoding="utf-8")
    broken = [name for name, value in figures["differences"].items() if value > BOUND]
    exact = all(figures["resume_bit_identical"].values()) and all(figures["each_example_once"].values())
    sys.exit(1 if broken or not exact else 0)


def measure(folder: Path) -> dict[str, Any]:
    """All figures, in a scratch folder."""
    model = make_tiny("llama", folder / "model", tokenizer=True)
    sample = Path(str(files("mlx_finetune") / "sample"))
    collect(Sources(sample / "gptme-logs", (str(sample / "openassistant.trees.jsonl"),)), Settings(), folder / "collected")
    prepare([folder / "collected"], ChatTemplate.load(model), make_config({"max_length": 512}, ""), folder / "data", {})
    straight = {engine: train(model, folder, engine, "straight") for engine in ENGINES}
    differences = {"engine against engine, 20 steps": distance(straight["mlx"], straight["torch"])}
    identical = {}
    for engine, other in (ENGINES, ENGINES[::-1]):
        differences[f"4 micro-batches against 1 batch, {engine}"] = accumulation(folder / "data", model, engine)
        resumed = resume(straight[engine], folder / f"{engine}-resumed", engine)
        identical[engine] = distance(straight[engine], resumed) == 0 and tensors(straight[engine]) == tensors(resumed)
        moved = resume(straight[engine], folder / f"{engine}-to-{other}", other)
        differences[f"resume at step 10 on the other engine, {engine} to {other}"] = distance(straight[engine], moved)
    dataset = Dataset.open(folder / "data")
    return {"differences": differences, "resume_bit_identical": identical, **epochs(dataset), "examples": len(dataset.train)}


def settings(model: Path, folder: Path, engine: str, name: str) -> RunConfig:
    """20 steps of 2 micro-batches with warmup, cosine, decay and clipping."""
    places = {"model": str(model), "data": str(folder / "data"), "out": str(folder / f"{engine}-{name}"), "engine": engine}
    shape = {"rank": 4, "alpha": 8, "learning_rate": 1e-3, "batch_size": 2, "gradient_accumulation": 2}
    return make_config(places | shape | {"steps": STEPS, "save_every": 10, "eval_every": 10, "dtype": "float32"}, "parity")


def train(model: Path, folder: Path, engine: str, name: str) -> Path:
    """A whole run; gives back its folder."""
    plan = plan_run(settings(model, folder, engine, name))
    execute(plan, lambda done, steps, note: None)
    return plan.run


def resume(run: Path, copy: Path, engine: str) -> Path:
    """The run with all after step 10 taken away, and run on by `engine`."""
    shutil.copytree(run, copy, symlinks=True)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:06d}")
    execute(plan_resume(copy, {"engine": engine}), lambda done, steps, note: None)
    return copy


def distance(one: Path, other: Path) -> float:
    """Largest difference of a loss, training or held out, at any step."""
    losses = [[row["loss"] for row in read_metrics(run / "metrics.jsonl")] for run in (one, other)]
    return float(np.ptp(np.array(losses), axis=0).max())


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
        opened = open_engine(settings(model, data.parent, engine, "x"), model)
        results = [opened.step(batches, 1e-3, seed=step) for step in range(2)]
        measured.append([number for result in results for number in (result.loss, result.grad_norm)])
    return float(np.ptp(np.array(measured), axis=0).max())


def epochs(dataset: Dataset) -> dict[str, Any]:
    """How often each example is seen in each of 3 epochs, for several batch shapes, one larger than the data."""
    once, counts = {}, {}
    for batch_size, steps in ((1, 1), (2, 2), (3, 4), (7, 1), (1000, 8)):
        shape = make_config({"batch_size": batch_size, "gradient_accumulation": steps}, "parity")
        each = []
        for epoch in range(3):
            per_epoch = dataset.steps_per_epoch(shape)
            seen = Counter(
                i
                for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)
                for batch in examples_at(dataset.train.lengths, batch_size, steps, 0, step)
                for i in batch
            )
            each.append(f"{len(seen)} examples, each {min(seen.values())} to {max(seen.values())} times")
            once[f"{batch_size} x {steps}, epoch {epoch + 1}"] = seen == Counter(range(len(dataset.train)))
        counts[f"{batch_size} x {steps}"] = each
    return {"each_example_once": once, "epoch_counts": counts}


def lines(figures: dict[str, Any]) -> list[str]:
    """The report."""
    report = [f"{name}: largest difference {value:.1e} (bound {BOUND:.0e})" for name, value in figures["differences"].items()]
    report += [
        f"resume at step 10 on {engine}: adapter and moments bit-identical: {same}"
        for engine, same in figures["resume_bit_identical"].items()
    ]
    report += [f"batch {shape}, epochs 1 to 3: {'; '.join(each)}" for shape, each in figures["epoch_counts"].items()]
    return report


def machine() -> dict[str, Any]:
    """Where this was measured."""
    packages = ("mlx", "mlx-lm", "torch", "transformers", "numpy")
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {p: version(p) for p in packages},
    }


if __name__ == "__main__":
    main()
