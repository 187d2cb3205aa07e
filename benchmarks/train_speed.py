"""Learned tokens a second and peak memory of our MLX engine beside `mlx_lm.lora`, as shipped and with its masks and lengths mended:

    .venv/bin/python benchmarks/train_speed.py [--quick] [--only rows,data,profile] [--lengths 512,1024] [--ours key=value ...]

Same weights (SmolLM2-135M-Instruct, float32), same LoRA, same tokens; each side in its own process, jobs taken in turns. Every
job is done once; while `--minutes` last, again (at most three times), and medians are taken. What they leave no time for is named.
`--quick`: 512 and 1,024 tokens, once, in 3 minutes of two free cores. `--ours` sets any field of RunConfig. Writes
train_speed.json and train_speed.md into benchmarks/results. Those that are there were made in two parts: the lengths up to 2,048,
and `--lengths 4096,8192 --name train_speed_long`.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from train_speed_data import NAMES, WHOLE, Shipped, cut_model, make_collections, row_of, shipped, width_of, windows
from train_speed_report import Figures, Key, data_figures, exponents, median_of, profile_figures, report, row_figures
from train_speed_sides import CUT_LAYERS, LAYERS, Sides
from train_speed_steps import ours_config, write_row

from mlx_finetune.config import FIELDS, parse_assignments
from mlx_finetune.data.batches import examples_at
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.models.gguf import find_smollm2, gguf_to_hugging_face

SAME_LOSS = 1e-3
STEP_TOKENS = 24576  # in a step on data at most
WARM = 1024  # tokens up to which a step is made once before: in longer ones, tracing is less than 1 % of the time
PARTS = ("rows", "data", "profile")
KINDS = ("row", "shipped", "profile", "data", "folded")  # rows first: what data takes the peer is read off them


@dataclass(frozen=True)
class Plan:
    """What is measured. Cut: with checkpointing alone, for without it the peer's 4,096 and 8,192 tokens do not fit."""

    whole: tuple[int, ...]  # lengths on the whole model
    cut: tuple[int, ...]  # on the cut one
    short: tuple[int, ...]  # further widths of the peer's curve
    examples: dict[int, int]  # in a step on data, by length
    profile: int | None
    repetitions: int
    warm: bool

    def only(self, lengths: Sequence[int] | None) -> "Plan":
        """Of it, what is asked for; None: all. Rows of the shorter widths, from which the peer's time on data is read, stay."""
        if lengths is None:
            return self
        most, whole = max(lengths), any(length <= max(self.whole) for length in lengths)
        return replace(
            self,
            whole=tuple(length for length in self.whole if whole and length <= most),
            cut=tuple(length for length in self.cut if length <= most) if most > max(self.whole) else (),
            examples={length: count for length, count in self.examples.items() if length in lengths},
            profile=self.profile if self.profile in lengths else None,
        )


FULL = Plan(
    (512, 1024, 2048), (512, 1024, 2048, 4096, 8192), (128, 256), dict.fromkeys((512, 1024, 2048, 4096, 8192), 8), 1024, 3, True
)
QUICK = Plan((512, 1024), (), (128,), {512: 3, 1024: 2}, None, 1, False)


@dataclass(frozen=True)
class Cell:
    """One collection at one length: the examples of a step, and what mlx_lm.lora makes of the whole."""

    letter: str
    length: int
    folder: Path
    groups: tuple[tuple[int, ...], ...]  # indices of the examples, by micro-batch
    lengths: tuple[int, ...]  # of them, in tokens
    learned: int  # tokens that they learn
    share: float  # of all assistant tokens of the collection, what the windows learn
    shipped: Shipped

    @property
    def cut(self) -> bool:
        """Whether the cut model, with checkpointing, is measured."""
        return self.length > max(FULL.whole)

    checkpoint = cut


class Bench:
    """All jobs of a plan, what they gave, and why some were not done."""

    def __init__(self, plan: Plan, folder: Path, model: Path, options: dict[str, Any]) -> None:
        self.plan, self.folder, self.model, self.options = plan, folder, model, options
        self.template = ChatTemplate.load(model)
        self.collected, missing = make_collections(folder, self.template)
        self.skipped = [f"({letter}) {NAMES[letter]}: {reason}" for letter, reason in missing.items()]
        if plan.cut:
            reason = "mlx_lm.lora would take 15 GB and more over the weights"
            self.skipped += [f"without checkpointing, from 4,096 tokens on: {reason}"]
        self.modes = [False, True] if "grad_checkpoint" in FIELDS else [False]
        if True not in self.modes:
            self.skipped += ["our engine with checkpointing: RunConfig has no grad_checkpoint"]
        self.whole = {
            letter: windows(path, self.template, folder / f"{letter}-whole", WHOLE) for letter, path in self.collected.items()
        }
        self.cells: list[Cell] = []
        self.jobs: dict[Key, dict[str, Any]] = {}
        self.results: dict[Key, list[Figures]] = {}

    def ask(self, parts: Sequence[str]) -> None:
        """Fills `jobs`."""
        for cut, lengths in ((False, self.plan.whole), (True, self.plan.cut)):
            if not lengths:
                continue
            for checkpoint in (True,) if cut else (False, True):
                if "rows" in parts or ("data" in parts and cut == checkpoint):  # what data takes the peer is read off its rows
                    self._ask_rows(cut, checkpoint, lengths, "rows" in parts)
        if "data" in parts:
            for length in self.plan.examples:
                self._ask_data(length)
        if "profile" in parts and self.plan.profile:
            for side in ("peer", "ours"):
                job = {"row": self._row(self.plan.profile), "profile": True}
                self.jobs[side, False, False, "profile", "a", self.plan.profile] = job

    def _ask_rows(self, cut: bool, checkpoint: bool, lengths: Sequence[int], both: bool) -> None:
        for length in (*(self.plan.short if cut == checkpoint else ()), *lengths):
            job: dict[str, Any] = {"row": self._row(length), "warm": self._warm(length)}
            self.jobs["peer", cut, checkpoint, "row", "a", length] = job
            if both and checkpoint in self.modes and length in lengths:
                self.jobs["ours", cut, checkpoint, "row", "a", length] = job
            if both and not checkpoint and length in lengths[: self.plan.repetitions - 1 or 1]:
                job = {"dataset": str(self.whole["a"].folder), "length": length, "warm": self._warm(length)}
                self.jobs["peer", cut, checkpoint, "shipped", "a", length] = job

    def _ask_data(self, length: int) -> None:
        for letter in self.collected:
            if length // 2 >= max(self.whole[letter].train.lengths):
                self.skipped.append(f"({letter}) {NAMES[letter]}, {length:,} tokens: the same windows as at {length // 2:,}")
                continue
            cell = self._cell(letter, length)
            self.cells.append(cell)
            job = {"dataset": str(cell.folder), "groups": cell.groups, "warm": False, "pack": max(64, *map(width_of, cell.lengths))}
            key = cell.cut, cell.checkpoint, "data", letter, length
            if cell.checkpoint in self.modes:
                self.jobs["ours", *key] = job
                self.jobs["ours", cell.cut, cell.checkpoint, "folded", letter, length] = job | {"pack": sum(cell.lengths)}
            # The peer too, once, to see what its curve is worth.
            if self.plan.repetitions > 1 and letter == "a" and length == min(self.plan.examples):
                self.jobs["peer", *key] = job

    def _cell(self, letter: str, length: int) -> Cell:
        """The step, of those of an epoch, whose share of learned tokens is nearest to that of all examples."""
        dataset = windows(self.collected[letter], self.template, self.folder / f"{letter}-{length}", length)
        config = ours_config(LAYERS, False, self.options)
        lengths = dataset.train.lengths
        examples = max(2, min(self.plan.examples[length], STEP_TOKENS * len(lengths) // sum(lengths)))
        shape = config.batch_size, -(-examples // config.batch_size)
        learned = [int((example.weights > 0).sum()) for example in dataset.train]

        def share(chosen: Sequence[int]) -> float:
            return sum(learned[i] for i in chosen) / sum(lengths[i] for i in chosen)

        count = max(1, len(lengths) // examples)
        steps = [examples_at(lengths, *shape, 0, step, dataset.train.families) for step in range(count)]
        groups = min(steps, key=lambda step: abs(share([i for g in step for i in g]) - share(range(len(lengths)))))
        chosen = [i for group in groups for i in group]
        theirs = shipped(self.whole[letter], self.model, length, 4 if length <= WARM else 1)
        figures = sum(learned[i] for i in chosen), sum(learned) / theirs.total
        places = tuple(map(tuple, groups)), tuple(lengths[i] for i in chosen)
        return Cell(letter, length, dataset.folder, *places, *figures, theirs)

    def _row(self, width: int) -> str:
        path = self.folder / f"row-{width}.npz"
        if not path.exists():
            write_row(path, row_of(self.whole["a"], width))
        return str(path)

    def _warm(self, length: int) -> bool:
        return self.plan.warm and length <= WARM

    def run(self, sides: Sides, minutes: float) -> None:
        """Round after round, each side in turn."""
        began = time.perf_counter()
        order = sorted(self.jobs, key=lambda key: (key[1], key[5], KINDS.index(key[3]), key[4], key[2], key[0]))
        spent: dict[Key, float] = {}
        for repetition in range(self.plan.repetitions):
            for key in order:
                start = time.perf_counter()
                late = start - began + spent.get(key, 0) > minutes * 60
                if late and not repetition:
                    self.skipped.append(f"{_named(key)}: no time left of {minutes:g} minutes")
                if late or (repetition and key not in self.results):
                    continue
                done = sides.do(key, self.jobs[key])
                spent[key] = time.perf_counter() - start
                self._keep(key, done, sides.memory)

    def _keep(self, key: Key, done: Figures | None, memory: int) -> None:
        named = _named(key)
        if done is None:
            self.skipped.append(f"{named}: not in {memory / 1e9:.0f} GB")
        else:
            self.results.setdefault(key, []).append(done)
            side, kind = "peer" if key[0] == "ours" else "ours", "data" if key[3] == "folded" else key[3]
            other = self.results.get((side, *key[1:3], kind, *key[4:]))
            if other and key[3] in ("row", "data", "folded"):
                assert abs(done["loss"] / other[0]["loss"] - 1) < SAME_LOSS, f"{named}: loss {done['loss']}, not {other[0]['loss']}"
        print(f"{named}: {done['cpu'] if done and 'cpu' in done else done}", file=sys.stderr)


def _named(key: Key) -> str:
    """For people."""
    side, cut, checkpoint, kind, letter, length = key
    model = ("whole", "cut")[cut] + (", checkpointed" if checkpoint else "")
    return f"{side}, {kind} {letter}, {length:,} tokens, model {model}"


def arguments_of_the_command() -> argparse.Namespace:
    """Checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 and 1,024 tokens, one repetition")
    parser.add_argument("--only", default=",".join(PARTS), help="some of rows,data,profile")
    parser.add_argument("--lengths", type=lambda text: tuple(map(int, text.split(","))), help="some of 512,1024,2048,4096,8192")
    parser.add_argument("--name", default="train_speed", help="of the files with the results")
    parser.add_argument("--ours", action="append", default=[], metavar="KEY=VALUE", help="a setting of our engine")
    parser.add_argument(
        "--minutes", type=float, default=38, help="nothing is begun after them, and no repetition that would end after them"
    )
    parser.add_argument("--memory", type=float, default=14, help="GB that a process may take")
    parser.add_argument("--model", type=Path, help="SmolLM2-135M-Instruct as a folder; else it is made from its GGUF")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    if unknown := set(arguments.lengths or ()) - plan.examples.keys():
        parser.error(f"--lengths {', '.join(map(str, unknown))}: not one of {', '.join(map(str, plan.examples))}")
    if unknown := set(arguments.only.split(",")) - set(PARTS):
        parser.error(f"--only {', '.join(unknown)}: not one of {', '.join(PARTS)}")
    return arguments


def main() -> None:
    """Prints and stores the figures."""
    arguments, here, began = arguments_of_the_command(), machine(), time.perf_counter()
    options, plan = parse_assignments(arguments.ours), (QUICK if arguments.quick else FULL).only(arguments.lengths)
    result: Figures = {"machine": here, "quick": arguments.quick, "options": options, "layers": LAYERS, "cut_layers": CUT_LAYERS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = arguments.model or folder / "SmolLM2-135M-Instruct"
        if not arguments.model:
            gguf_to_hugging_face(find_smollm2(), model)
        bench = Bench(plan, folder, model, options)
        bench.ask(arguments.only.split(","))
        cut = cut_model(model, folder / "cut", CUT_LAYERS) if plan.cut else model
        with Sides({False: model, True: cut}, options, int(arguments.memory * 1e9)) as sides:
            bench.run(sides, arguments.minutes)
    measured = {key: median_of(each) for key, each in bench.results.items()}
    rows = row_figures(measured)
    result |= {"rows": rows, "data": data_figures(measured, bench.cells), "exponents": exponents(rows)}
    result |= {"profile": profile_figures(measured), "skipped": bench.skipped, "minutes": (time.perf_counter() - began) / 60}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{arguments.name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (arguments.out / f"{arguments.name}.md").write_text(report(result), encoding="utf-8")
    print(report(result))


def machine() -> dict[str, Any]:
    """Where this is measured; first of all, for a BLAS is chosen before MLX is loaded."""
    from mlx_finetune.engines.mlx import FAST_BLAS

    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    versions = {name: version(name) for name in ("mlx", "mlx-lm", "numpy")}
    return {"machine": system, "versions": versions, "blas": Path(FAST_BLAS or "of MLX").name}


if __name__ == "__main__":
    main()
