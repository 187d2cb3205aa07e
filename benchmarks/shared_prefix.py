"""What folding examples that begin alike saves: one step on eight examples with a common system prompt, in four ways.

    .venv/bin/python benchmarks/shared_prefix.py [--tokens 512] [--shared 0.77]

SmolLM2-135M-Instruct in float32, LoRA of rank 8 on the last 16 of its 30 layers; random tokens, a third of the rest learned. Each
way in its own process, on one thread: CPU seconds of the step, and MLX's peak over the weights.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.config import make_config
from mlx_finetune.data.batches import Batch, Example
from mlx_finetune.models.gguf import find_smollm2, gguf_to_hugging_face

ROWS = {"share_prefixes": "never", "attention": "fused"}
WAYS: tuple[dict[str, Any], ...] = (ROWS, ROWS | {"attention": "blocks"}, {"pack_length": 8192})
WAYS += (WAYS[-1] | {"grad_checkpoint": 1},)
EXAMPLES = 8


def examples(tokens: int, shared: float) -> list[Example]:
    """The same first part; behind it a third is learned, in turns of 45 tokens."""
    random, start = np.random.default_rng(0), int(tokens * shared)
    prompt, weights = random.integers(3, 40_000, start), np.zeros(tokens, np.float32)
    for place in range(start + 20, tokens - 40, 150):
        weights[place : place + 45] = 1
    rows = [np.concatenate([prompt, random.integers(3, 40_000, tokens - start)]).astype(np.int32) for _ in range(EXAMPLES)]
    return [Example(row, weights, "gptme", "", (1,)) for row in rows]


def measure(model: str, settings: dict[str, Any], tokens: int, shared: float) -> dict[str, Any]:
    """One step."""
    from mlx_finetune.engines.mlx.engine import MlxEngine

    import mlx.core as mx  # isort: skip

    config = make_config({"dtype": "float32", "rank": 8, "num_layers": 16} | settings, "the benchmark")
    engine, batches = MlxEngine(Path(model), config), [Batch.of([one]) for one in examples(tokens, shared)]
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.process_time()
    result = engine.step(batches, 1e-4, 0)
    seconds, peak = time.process_time() - start, (mx.get_peak_memory() - before) / 1e9
    return settings | {"cpu_seconds": seconds, "peak_gb": peak, "loss": result.loss, "tokens_computed": result.computed}


def main() -> None:
    """Prints and stores the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--shared", type=float, default=0.77)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "shared_prefix.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], json.loads(arguments.one[1]), arguments.tokens, arguments.shared)))
        return
    found, shape = [], ["--tokens", str(arguments.tokens), "--shared", str(arguments.shared)]
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "SmolLM2-135M-Instruct"
        gguf_to_hugging_face(find_smollm2(), model)
        for way in WAYS:
            command = [sys.executable, __file__, *shape, "--one", str(model), json.dumps(way)]
            one_thread = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=one_thread)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(found[-1], flush=True)
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    result = {"machine": machine, "examples": EXAMPLES, "tokens": arguments.tokens, "shared": arguments.shared, "ways": found}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
