"""Whether 1,000 steps of training on examples of all lengths, rows and trees, grow in memory:

    .venv/bin/python benchmarks/growth.py [--steps 1000] [--engine mlx]

A tiny random Llama on the embedded sample. Written down: bytes of this process, and on MLX those of its arrays, at some steps.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny_models import make_tiny

import mlx_finetune
from mlx_finetune.config import make_config
from mlx_finetune.data.collect import collect
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.found import Sources
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.refine import Settings
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.engines import open_engine

SAMPLE = Path(mlx_finetune.__file__).parent / "sample"


def look(engine: str, start: float) -> dict[str, Any]:
    """Megabytes held now."""
    found = {"seconds": time.perf_counter() - start, "process_mb": psutil.Process().memory_info().rss / 1e6}
    if engine == "mlx":
        import mlx.core as mx

        found["arrays_mb"] = mx.get_active_memory() / 1e6
    return found


def main() -> None:
    """Prints and stores the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--engine", choices=("mlx", "torch"), default="mlx")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "growth.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_tiny("llama", folder / "model", tokenizer=True)
        collect(Sources(SAMPLE / "gptme-logs"), Settings(), folder / "collected")
        config = make_config({"engine": arguments.engine, "rank": 4, "max_length": 512, "gradient_accumulation": 2}, "growth")
        prepare([folder / "collected"], ChatTemplate.load(model), config, folder / "data", {})
        dataset, engine = Dataset.open(folder / "data"), open_engine(config, model)
        start, looks = time.perf_counter(), {}
        for step in range(arguments.steps):
            engine.step(dataset.batches_at(step, config), 1e-4, step)
            if step + 1 in (10, 100, 200, 500, arguments.steps):
                looks[step + 1] = look(arguments.engine, start)
                print(step + 1, looks[step + 1], flush=True)
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {arguments.engine}"
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine, "steps": looks}, indent=2) + "\n")


if __name__ == "__main__":
    main()
