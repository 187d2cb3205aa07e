"""What parity.py, portability.py and processes.py share: tables with bounds, the machine, the embedded sample."""

import argparse
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import psutil

from mlx_finetune.config import make_config
from mlx_finetune.data.collect import collect
from mlx_finetune.data.found import Sources
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.refine import Settings
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.training.metrics import read_metrics

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("mlx", "mlx-lm", "torch", "transformers", "peft", "numpy")
ENGINES = ("mlx", "torch")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of figures, and what each may be at most."""

    title: str
    text: str  # what was measured, and why the bounds are what they are
    rows: Sequence[Figures]  # the first column names the row
    most: Mapping[str, float] = field(default_factory=dict)  # by column
    promised: tuple[str, ...] = ()  # columns that have to be true

    def broken(self) -> list[str]:
        """Each figure that is not within its bound, and each promise that is not kept."""
        found = [] if self.rows else [f"{self.title}: nothing was measured"]
        for row in self.rows:
            name = f"{self.title}: {next(iter(row.values()))}"
            found += [f"{name}: {c} is {row[c]}, at most {m:g}" for c, m in self.most.items() if not _within(row.get(c, 0.0), m)]
            found += [f"{name}: {column}: no" for column in self.promised if row.get(column) is False]
        return found

    def lines(self) -> list[str]:
        """As Markdown; bounds stand in the head."""
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        heads = [f"{c} (at most {self.most[c]:.0e})" if c in self.most else c for c in columns]
        grid = [heads, ["---"] * len(columns), *([_shown(row.get(column, "")) for column in columns] for row in self.rows)]
        return [f"## {self.title}", "", fill(self.text, 132), "", *("| " + " | ".join(cells) + " |" for cells in grid), ""]


def _within(value: float | None, most: float) -> bool:
    return value is not None and value <= most  # NaN is not


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.1e}" if abs(value) < 1e-2 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def run(name: str, about: str, measure: Callable[[Path], Sequence[Table]]) -> None:
    """The command line of a script: measures, writes NAME.md and NAME.json, ends with 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the results go")
    out, began = parser.parse_args().out, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tables = measure(Path(folder))
    figures = machine() | {"minutes": round((time.perf_counter() - began) / 60, 1)}
    broken = [line for table in tables for line in table.broken()]
    text = report(name, about, figures, tables, broken)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    found = figures | {"broken": broken, "tables": [asdict(table) for table in tables]}
    (out / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(text)
    sys.exit(1 if broken else 0)


def report(name: str, about: str, figures: Figures, tables: Iterable[Table], broken: Sequence[str]) -> str:
    """All of it as Markdown."""
    versions = ", ".join(f"{package} {number}" for package, number in figures["versions"].items())
    head = f"Made by `benchmarks/{name}.py` in {figures['minutes']} minutes: {figures['machine']}; {versions}."
    said = [f"- **broken: {line}**" for line in broken] or ["Every bound holds."]
    lines = [f"# {about.splitlines()[0].rstrip('.:')}", "", fill(head, 132), "", *said, ""]
    return "\n".join([*lines, *(line for table in tables for line in table.lines())]).rstrip() + "\n"


def machine() -> Figures:
    """Where this is measured."""
    memory = psutil.virtual_memory().total / 2**30
    return {
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB",
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
    }


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def each(function: Callable[[Any], Any], jobs: Sequence[Any], workers: int) -> list[Any]:
    """`function` of each job, in their order; by so many processes, or by this one."""
    if workers == 1:
        return [function(job) for job in jobs]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(function, jobs))


def sample_data(model: Path, folder: Path, **settings: Any) -> Path:
    """The embedded sample, collected and prepared for `model` in windows of 512 tokens; gives back the prepared folder."""
    sample = Path(str(files("mlx_finetune") / "sample"))
    collect(Sources(sample / "gptme-logs", (str(sample / "openassistant.trees.jsonl"),)), Settings(), folder / "collected")
    config = make_config({"max_length": 512} | settings, "benchmark")
    prepare([folder / "collected"], ChatTemplate.load(model), config, folder / "data", {})
    return folder / "data"


def distance(one: Path, other: Path, after: int = -1) -> float:
    """Largest difference of a loss, training or held out, in any step behind `after` of two runs."""
    rows = [
        {(row["step"], row["split"]): row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["step"] > after}
        for run in (one, other)
    ]
    if not rows[0] or rows[0].keys() != rows[1].keys():
        return math.inf
    return float(max(np.abs(rows[0][key] - rows[1][key]) for key in rows[0]))
