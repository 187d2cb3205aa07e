"""Learned tokens a second and peak memory of our torch engine beside TRL's `SFTTrainer` and transformers' `Trainer`, with peft:

    .venv/bin/python benchmarks/torch_speed.py [--lengths 512,1024] [--rounds 3] [--minutes 21] [--model FOLDER | --random 1b|3b]

The same token ids and labels, adapter, optimizer and threads; each side in each setting in a process of its own, which warms up
with one optimizer step and times `--steps` more (of the mix: all). In a round the sides take turns. Every setting is done once,
and again while `--minutes` last, at most `--rounds` times; medians are taken. On a CPU in float32 with SmolLM2-135M-Instruct;
where there is CUDA, frozen weights in bfloat16, and lengths of 2048, 4096 and 8192, meant for `--random`. `--ours` sets any field
of RunConfig. Writes torch_speed.json and torch_speed.md into benchmarks/results, and ends with status 1 where the sides did not
learn the same tokens with the same losses. Two free cores take about 20 minutes for a round, and up to 15 GB; three rounds want
`--minutes 65`.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from torch_speed_data import WARM, Data, make_smollm2
from torch_speed_report import cells, goals, report, unequal
from train_speed_steps import Figures

from mlx_finetune.config import parse_assignments
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.planning.model_shape import ModelShape, model_shape

STEPS_SCRIPT = Path(__file__).with_name("torch_speed_steps.py")
MIX = (4, 2)  # batch, micro-batches in a step
SIDES = ("ours", "trl", "hf")
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "4090": 165.0}  # TFLOPS, dense bfloat16, as their makers say
VERSIONS = ("torch", "transformers", "peft", "trl", "accelerate", "numpy")
BY_DEVICE = {False: {"lengths": (512, 1024), "steps": 1, "mix": 8}, True: {"lengths": (2048, 4096, 8192), "steps": 4, "mix": 64}}


@dataclass(frozen=True)
class Setting:
    """What all sides do."""

    kind: str  # "rows" or "mix"
    length: int  # tokens of a row; of the mix, at most
    batch: int
    accumulation: int
    checkpoint: bool

    def __str__(self) -> str:
        checkpointed = ", checkpointed" if self.checkpoint else ""
        return f"{self.kind}, {self.length:,} tokens, batch {self.batch} x {self.accumulation}{checkpointed}"


class Bench:
    """All settings of all sides, what they gave, and why some were not measured."""

    def __init__(self, folder: Path, model: Path, arguments: argparse.Namespace) -> None:
        self.model, self.arguments = model, arguments
        self.data = Data(folder, model, max(arguments.lengths) if arguments.cuda else WARM)
        self.results: dict[tuple[Setting, str], list[Figures]] = {}
        self.skipped: list[str] = []
        self.sides = [*SIDES]
        if arguments.cuda and importlib.util.find_spec("unsloth"):
            self.sides.append("unsloth")
        else:
            self.skipped.append(f"unsloth: {'not installed' if arguments.cuda else 'no CUDA here'}")

    def settings(self) -> list[Setting]:
        """Without and with gradient checkpointing; the mix at one length."""
        asked = self.arguments
        shapes = [("mix", asked.mix_length, MIX)] if "mix" in asked.only else []
        shapes += [("rows", length, batch) for length in asked.lengths for batch in asked.batches if "rows" in asked.only]
        found = ((*shape, word == "yes") for shape in shapes for word in asked.checkpointing)
        return [Setting(kind, length, batch, times, checkpoint) for kind, length, (batch, times), checkpoint in found]

    def folder(self, setting: Setting) -> Path:
        """Its data, prepared."""
        step = setting.batch * setting.accumulation
        if setting.kind == "mix":
            return self.data.mix(setting.length, self.arguments.mix, step)
        return self.data.rows(setting.length, step, self.arguments.mix_length)

    def run(self) -> None:
        """Round after round; who begins changes from round to round."""
        began, spent = time.perf_counter(), dict.fromkeys(self.settings(), 0.0)
        for number in range(self.arguments.rounds):
            for setting in spent:
                start = time.perf_counter()
                late = start - began + spent[setting] > self.arguments.minutes * 60
                if late and not number:
                    self.skipped.append(f"{setting}: no time left of {self.arguments.minutes:g} minutes")
                if late or (number and not any((setting, side) in self.results for side in self.sides)):
                    continue
                first = number % len(self.sides)
                for side in self.sides[first:] + self.sides[:first]:
                    if not number or (setting, side) in self.results:
                        self._do(setting, side)
                spent[setting] = time.perf_counter() - start

    def _do(self, setting: Setting, side: str) -> None:
        job = {"side": side, "model": str(self.model), "data": str(self.folder(setting)), "in_order": setting.kind == "rows"}
        job |= {"repeat": self.arguments.steps if setting.kind == "rows" else 1, "threads": self.arguments.threads}
        job |= {"dtype": self.arguments.dtype, "options": parse_assignments(self.arguments.ours)}
        done = ask(job | asdict(setting), self.arguments.threads, must=side != "unsloth")
        if "failed" in done:
            self.skipped.append(f"{side}, {setting}: {done['failed']}")
        else:
            self.results.setdefault((setting, side), []).append(done)
        brief = done.get("failed") or f"{done['seconds']:.2f} s, {done['learned']:,} learned, {done['peak'] / 1e6:,.0f} MB"
        print(f"{setting}: {side}: {brief}", file=sys.stderr)

    def operations(self, shape: ModelShape, setting: Setting) -> float:
        """Those that LoRA cannot do without, in what is timed: forward, and the gradients of what enters frozen matrices.

        Attention of the past alone, the head where something is learned; no padding, no recomputation, not the adapter.
        """
        sizes, repeat = shape.sizes, self.arguments.steps if setting.kind == "rows" else 1
        width, total = sizes.heads * sizes.head_dim, 0.0
        for example in Dataset.open(self.folder(setting)).train:
            tokens, learned = len(example.tokens), int((example.weights > 0).sum())
            total += sizes.layers * (4.0 * shape.layer_matrices * tokens + 6.0 * width * tokens**2)
            total += 4.0 * sizes.hidden * sizes.vocabulary * learned
        return total * repeat


def ask(job: dict[str, Any], threads: int, must: bool = True) -> Any:
    """What a process of its own answers; {"failed": why} where memory was not enough, or where it need not (`must`)."""
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # a Trainer would take all that it sees
    environment |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": first}
    command = [sys.executable, str(STEPS_SCRIPT), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode < 0:  # a machine without memory kills
        return {"failed": f"ended by signal {-done.returncode}"}
    if done.returncode and must:
        raise SystemExit(f"{job}: {done.stderr[-4000:]}")
    return {"failed": done.stderr.strip().splitlines()[-1]} if done.returncode else json.loads(done.stdout)


def machine() -> Figures:
    """Where this is measured."""
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return {"machine": system, "versions": {name: version(name) for name in VERSIONS}}


def peak_of(device: str) -> float | None:
    """TFLOPS of a GPU of the table."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def arguments_of_the_command(given: Sequence[str] | None = None) -> argparse.Namespace:
    """With what the device decides filled in."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=lambda text: tuple(map(int, text.split(","))), help="tokens of the rows")
    parser.add_argument("--mix-length", type=int, help="tokens of the mix's windows at most; the longest of --lengths")
    parser.add_argument("--mix", type=int, help="windows in the mix; 8, on a GPU 64")
    parser.add_argument("--steps", type=int, help="timed optimizer steps on rows; 1, on a GPU 4")
    parser.add_argument("--batches", type=batches, default="1x4,4x1", help="of the rows: rows in a batch x micro-batches in a step")
    parser.add_argument("--checkpointing", type=words("no", "yes"), default="no,yes", help="no or yes; both")
    parser.add_argument("--only", type=words("rows", "mix"), default="rows,mix", help="rows or mix")
    parser.add_argument("--rounds", type=int, default=3, help="at most")
    parser.add_argument("--minutes", type=float, default=21, help="nothing begins after them, no repetition that would end later")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of all sides; all that there are")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; else SmolLM2-135M-Instruct is made from its GGUF")
    parser.add_argument("--random", choices=("1b", "3b"), help="a Llama of that size with random weights instead")
    parser.add_argument("--ours", action="append", default=[], metavar="KEY=VALUE", help="a setting of our engine")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for the utilisation; known: " + ", ".join(PEAKS))
    parser.add_argument("--name", default="torch_speed", help="of the files with the results")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    arguments = parser.parse_args(given)
    arguments.cuda = torch.cuda.is_available()
    arguments.dtype = "bfloat16" if arguments.cuda else "float32"
    for name, value in BY_DEVICE[arguments.cuda].items():
        setattr(arguments, name, getattr(arguments, name) or value)
    arguments.mix_length = arguments.mix_length or max(arguments.lengths)
    return arguments


def batches(text: str) -> list[tuple[int, int]]:
    """`1x4` is one row in each of four micro-batches."""
    shapes = [tuple(map(int, shape.split("x"))) for shape in text.split(",")]
    return [(batch, accumulation) for batch, accumulation in shapes]


def words(*known: str) -> Callable[[str], list[str]]:
    """Reads some of them, with commas between."""

    def read(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return text.split(",")

    return read


def model_of(arguments: argparse.Namespace, folder: Path) -> Path:
    """The model that is asked for; a random one is made by another process, so that this one holds no memory of a GPU."""
    if arguments.random:
        return Path(ask({"make": arguments.random, "folder": str(folder)}, arguments.threads))
    return arguments.model or make_smollm2(folder)


def main() -> None:
    """Prints and stores the figures."""
    arguments, began = arguments_of_the_command(), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        model = model_of(arguments, Path(name))
        bench, shape = Bench(Path(name), model, arguments), model_shape(str(model))
        bench.run()
        operations = {setting: bench.operations(shape, setting) for setting in bench.settings()}
    device = next(iter(bench.results.values()))[0]["device"]
    peak = arguments.peak_tflops or peak_of(device)
    table = cells(bench.results, operations, peak)
    result = machine() | {"device": device, "dtype": arguments.dtype, "threads": arguments.threads, "model": model.name}
    result |= {"parameters": shape.parameters, "options": parse_assignments(arguments.ours), "steps": arguments.steps}
    result |= {"mix": arguments.mix, "rounds": arguments.rounds, "peak_tflops": peak, "cells": table, "goals": goals(table)}
    result |= {"settings": {side: done[0]["settings"] for (_, side), done in reversed(bench.results.items())}}
    result |= {"unequal": unequal(table, arguments.dtype), "skipped": bench.skipped, "minutes": (time.perf_counter() - began) / 60}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{arguments.name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (arguments.out / f"{arguments.name}.md").write_text(report(result), encoding="utf-8")
    print(report(result))
    sys.exit(1 if result["unequal"] else 0)


if __name__ == "__main__":
    main()
