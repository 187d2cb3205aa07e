"""Predicted peak memory against mx.get_peak_memory: steps of small random models with the MLX engine, in a process each.

    .venv/bin/python benchmarks/plan_memory.py [--fit] [--only llama] [--measured benchmarks/results/plan_memory.json]

Prints a table, the median and the worst error, and writes benchmarks/results/plan_memory.json. `--fit` also prints the
coefficients that fit these peaks best (for mlx_finetune/planning/memory.py), the errors with them, and those for each model
with coefficients fitted to the other two; `--measured` takes
the peaks from an earlier run instead of measuring. Settings that RunConfig does not have are skipped by name.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from tiny_models import make_tiny

import mlx_finetune.engines.mlx  # noqa: F401  before MLX is imported: its fast BLAS
from mlx_finetune.config import FIELDS, make_config
from mlx_finetune.planning.calibrate import random_batch
from mlx_finetune.planning.memory import Coefficients, Dials, dials_of, evaluation_terms, memory, step_terms, weigh
from mlx_finetune.planning.model_shape import ModelShape, model_shape

OUT = Path(__file__).parent / "results" / "plan_memory.json"
SHARE = 0.3
LITTLE = 64  # tokens
PULL = 0.3  # towards the coefficients that there are, so that what these settings cannot tell apart stays as it is
ROUNDS = 60
BOUNDS = {"median": 0.05, "worst": 0.15}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",  # SmolLM2-135M, six layers of it
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9, "num_key_value_heads": 3,
         "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True},
    ),
    "qwen3": (
        "qwen3",  # heads wider than the hidden size, as in Qwen3-4B
        {"hidden_size": 320, "intermediate_size": 1216, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
         "head_dim": 64, "vocab_size": 32000, "tie_word_embeddings": True},
    ),
    "phi3": (
        "phi3",  # fused matrices, untied, as many keys as queries
        {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 6,
         "vocab_size": 8192, "tie_word_embeddings": False},
    ),
}  # fmt: skip
TWO = {"llama": "q_proj,v_proj", "qwen3": "q_proj,v_proj", "phi3": "qkv_proj,o_proj"}


def settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Model and settings, in RunConfig's words; 23 for each model."""
    for name in MODELS:
        for length in (256, 512, 1024, 2048):
            for again in (0, 1):
                yield name, {"max_length": length, "attention": "blocks", "grad_checkpoint": again}
        for length in (512, 1024, 2048):
            for again in (0, 1):
                yield name, {"max_length": length, "attention": "fused", "grad_checkpoint": again}
        yield name, {"max_length": 1024, "attention": "blocks", "grad_checkpoint": 2}
        yield name, {"max_length": 1024, "attention": "blocks", "grad_checkpoint": 0, "num_layers": 2}
        yield name, {"max_length": 1024, "attention": "blocks", "grad_checkpoint": 1, "num_layers": 3}
        yield name, {"max_length": 512, "attention": "blocks", "batch_size": 4}
        yield name, {"max_length": 512, "attention": "blocks", "batch_size": 4, "grad_checkpoint": 1}
        yield name, {"max_length": 1024, "attention": "blocks", "rank": 64}
        yield name, {"max_length": 1024, "attention": "blocks", "target_modules": TWO[name]}
        yield name, {"max_length": 512, "attention": "blocks", "dtype": "bfloat16"}
        yield name, {"max_length": 4096, "attention": "blocks", "grad_checkpoint": 1}


def main() -> None:
    """Measures, compares, and exits with 1 where the bounds are broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the coefficients")
    parser.add_argument("--only", default="", help="one model of the list")
    parser.add_argument("--measured", type=Path, help="peaks of an earlier run")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(**json.loads(arguments.worker))))
        return
    with tempfile.TemporaryDirectory() as folder:
        shapes = {name: make_model(name, Path(folder) / name) for name in MODELS}
        earlier = json.loads(arguments.measured.read_text(encoding="utf-8"))["settings"] if arguments.measured else []
        rows = earlier or list(measure_all(Path(folder), arguments.only))
    report = compare(rows, shapes, Coefficients())
    print_report(rows, report)
    result = machine() | {
        "errors": report["errors"],
        "settings": [row | {"predicted": p} for row, p in zip(rows, report["predicted"], strict=True)],
    }
    if arguments.fit:
        fitted = fit(rows, shapes)
        result["fitted"] = {name: round(value, 3) for name, value in vars(fitted).items()}
        print(*(f"    {name}: float = {value}" for name, value in result["fitted"].items()), sep="\n")
        result["errors_fitted"] = compare(rows, shapes, fitted)["errors"]
        print("with them:", says(result["errors_fitted"]))
        result["errors_left_out"] = left_out(rows, shapes)
        for name, errors in result["errors_left_out"].items():
            print(f"{name}, by coefficients fitted without it:", says(errors))
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    errors = result.get("errors_fitted", report["errors"])["peak"]
    sys.exit(1 if any(errors[name] > bound for name, bound in BOUNDS.items()) else 0)


def make_model(name: str, folder: Path) -> ModelShape:
    """Writes a random checkpoint."""
    model_type, sizes = MODELS[name]
    return model_shape(str(make_tiny(model_type, folder, tokenizer=False, changes=sizes)))


def measure_all(folder: Path, only: str) -> Iterator[dict[str, Any]]:
    """One process a setting: a peak is of a process."""
    todo = [(name, each) for name, each in settings() if only in ("", name)]
    skipped = {key for _, each in todo for key in each if key not in FIELDS}
    if skipped:
        print(f"skipped, not in RunConfig: {', '.join(sorted(skipped))}")
    todo = [(name, each) for name, each in todo if not skipped & each.keys()]
    for number, (name, each) in enumerate(todo):
        asked = json.dumps({"folder": str(folder / name), "values": each})
        done = subprocess.run([sys.executable, __file__, "--worker", asked], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name} {each}: {done.stderr}")
        print(f"{number + 1}/{len(todo)} {name} {each}", file=sys.stderr)
        yield {"model": name, "values": each, **json.loads(done.stdout)}


def measure(folder: str, values: dict[str, Any]) -> dict[str, int]:
    """Peak bytes while the model is loaded, in a step, and in a held-out loss."""
    import mlx.core as mx

    from mlx_finetune.engines.mlx.engine import MlxEngine

    config = make_config(values, "the benchmark")
    vocabulary = model_shape(folder).sizes.vocabulary
    random = np.random.default_rng(0)
    little = random_batch(random, 1, LITTLE, vocabulary, SHARE)  # so that there is a sum of gradients
    batch = random_batch(random, config.batch_size, config.max_length, vocabulary, SHARE)
    batch.weights[:, -1] = 1  # what stands behind the last learned token is not computed
    mx.reset_peak_memory()
    engine = MlxEngine(Path(folder), config)
    peaks = {"load": mx.get_peak_memory()}
    engine.state()  # the moments come into being
    for phase in ("step", "evaluation"):
        mx.reset_peak_memory()
        engine.step([little, batch], 1e-4, 0) if phase == "step" else engine.loss_sum(batch)
        peaks[phase] = mx.get_peak_memory()
    return peaks


def dials(row: Mapping[str, Any], shape: ModelShape) -> Dials:
    """As the engine takes these settings on a CPU."""
    config = make_config(row["values"], "the benchmark")
    found = dials_of(config, shape, SHARE, on_gpu=False)
    return replace(found, learned_share=(round(SHARE * config.max_length) + 0.7) / config.max_length)


def compare(rows: Sequence[Mapping[str, Any]], shapes: Mapping[str, ModelShape], c: Coefficients) -> dict[str, Any]:
    """Predictions, and their errors: of the peak, of what it holds beyond the weights, and of the other phases."""
    predicted, errors = [], {"peak": [], "over_weights": [], "evaluation": [], "load": []}  # type: ignore[var-annotated]
    for row in rows:
        found = memory(shapes[row["model"]], dials(row, shapes[row["model"]]), c)
        predicted.append(dict(found.phases))
        errors["peak"].append(found.phases["step"] / row["step"] - 1)
        errors["over_weights"].append((found.phases["step"] - found.weights) / (row["step"] - found.weights) - 1)
        errors["evaluation"].append(found.phases["evaluation"] / row["evaluation"] - 1)
        errors["load"].append(found.phases["load"] / row["load"] - 1)
    summary = {
        name: {"median": float(np.median(np.abs(each))), "worst": float(np.abs(each).max())} for name, each in errors.items()
    }
    return {"predicted": predicted, "errors": summary, "each": errors}


def fit(rows: Sequence[Mapping[str, Any]], shapes: Mapping[str, ModelShape]) -> Coefficients:
    """Least squares of relative errors; in which place the peak is, is asked anew in each round."""
    start = best = c = Coefficients()
    names = tuple(vars(start))
    pull = np.diag([PULL / getattr(start, name) for name in names])
    for _ in range(ROUNDS):
        lines, wanted = [], []
        for row in rows:
            shape = shapes[row["model"]]
            one = dials(row, shape)
            found = memory(shape, one, c)
            for phase, places in (("step", step_terms(shape, one)), ("evaluation", evaluation_terms(shape, one))):
                terms = max(places, key=lambda terms: weigh(terms, c))
                counted = found.phases[phase] - weigh(terms, c)
                scale = row[phase] - found.weights
                lines.append([terms.get(name, 0.0) / scale for name in names])
                wanted.append((row[phase] - counted) / scale)
        goal = np.concatenate([np.array(wanted), np.full(len(names), PULL)])
        solution = _not_negative(np.concatenate([np.array(lines), pull]), goal)
        c = Coefficients(**{name: (getattr(c, name) + float(value)) / 2 for name, value in zip(names, solution, strict=True)})
        if _loss(rows, shapes, c) < _loss(rows, shapes, best):
            best = c
    return best


def left_out(rows: Sequence[Mapping[str, Any]], shapes: Mapping[str, ModelShape]) -> dict[str, Any]:
    """Errors for each model with coefficients that were fitted to the others alone: what an unknown architecture may expect."""
    found = {}
    for name in dict.fromkeys(row["model"] for row in rows):
        others, own = ([row for row in rows if (row["model"] == name) == same] for same in (False, True))
        if others:
            found[name] = compare(own, shapes, fit(others, shapes))["errors"]
    return found


def _loss(rows: Sequence[Mapping[str, Any]], shapes: Mapping[str, ModelShape], c: Coefficients) -> float:
    return float(np.square(compare(rows, shapes, c)["each"]["over_weights"]).sum())


def _not_negative(matrix: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Least squares with coefficients of at least 0: those that would be less are left out, one round after the other."""
    solution, active = np.zeros(matrix.shape[1]), np.arange(matrix.shape[1])
    while active.size:
        solution[:] = 0
        solution[active] = np.linalg.lstsq(matrix[:, active], goal, rcond=None)[0]
        if (solution >= 0).all():
            break
        active = active[solution[active] > 0]
    return solution


def print_report(rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> None:
    """One line a setting, and the errors."""
    print(f"{'measured':>9} {'predicted':>9} {'error':>7} {'over w.':>8}   of a step, in MB")
    for i, row in enumerate(rows):
        told = " ".join(f"{name}={value}" for name, value in row["values"].items())
        peak, over = report["each"]["peak"][i], report["each"]["over_weights"][i]
        line = f"{row['step'] / 1e6:9.1f} {report['predicted'][i]['step'] / 1e6:9.1f} {100 * peak:6.1f}% {100 * over:7.1f}%"
        print(f"{line}   {row['model']} {told}")
    print(f"{len(rows)} settings:", says(report["errors"]))


def says(errors: Mapping[str, Mapping[str, float]]) -> str:
    """In words."""
    return "; ".join(f"{name} median {100 * e['median']:.1f} %, worst {100 * e['worst']:.1f} %" for name, e in errors.items())


def machine() -> dict[str, Any]:
    """Where this was measured."""
    return {"machine": platform.machine(), "system": platform.system(), "mlx": version("mlx"), "mlx-lm": version("mlx-lm")}


if __name__ == "__main__":
    main()
