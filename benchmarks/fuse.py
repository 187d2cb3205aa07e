"""How long adding an adapter to a checkpoint takes, in how much memory, and how exactly: against mlx_lm.fuse and peft.

    .venv/bin/python benchmarks/fuse.py [--out FOLDER]

The random Llama of 1.34 GB and the random Qwen3-MoE of 0.8 GB of convert.py, all linear layers adapted, of the latter the experts
too; each tool is a program of its own, twice in turn, of which the faster counts. Takes 4 minutes of two cores and 6 GB of disk;
writes fuse.md and fuse.json; exit status 1 where a bound is broken.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from convert import LLAMA, MOE, make, shapes
from safetensors.numpy import save_file
from tables import Table, run

from mlx_finetune.files import write_json
from mlx_finetune.models.weights import from_float32, read_float32, tensor_headers, to_float32

TEXT = """\
Wall time and the kernel's high water mark of the process, Python's start and imports counted in; `imports` is how long those of
mlx-finetune take by themselves. All add the same adapter to weights in bfloat16; mlx-finetune ran without the comparison of logits,
which no other has. A copy of the files is shutil.copytree. Allowed are 450 MB and, for the Llama, twice the copy beyond the
imports, which for an adapter of mlx-lm are those of mlx and mlx-lm too."""
EXACT = """\
Of each changed matrix, of eight that were looked at, the share of numbers that are not W + scale B A in float32 rounded once. What
mlx_lm.fuse makes of the mixture has other tensors than the original, which transformers takes for missing."""
RANK, SCALE = 8, 2.0
ROUNDS, MOST_MB, MOST_COPIES, LOOKED_AT = 2, 450.0, 2.0, 8
PEAK = (
    "import atexit, sys; from mlx_finetune.engines import process_peak\n"
    "atexit.register(lambda: print(process_peak(), file=sys.stderr))\n"
)
OURS = PEAK + "from pathlib import Path; from mlx_finetune.export.fuse import fuse; fuse(*map(Path, sys.argv[1:]))"
IMPORTS = PEAK + "from mlx_finetune.export.fuse import fuse"
MLX_TOO = "; import mlx_finetune.engines.mlx.load, mlx_finetune.engines.mlx.pullback, mlx_lm.tuner.utils"
MLX_LM = PEAK + (
    "import runpy; model, adapter, out = sys.argv[1:]\n"
    "sys.argv = ['fuse', '--model', model, '--adapter-path', adapter, '--save-path', out]\n"
    "runpy.run_module('mlx_lm.fuse', run_name='__main__', alter_sys=True)"
)
PEFT = PEAK + (
    "import torch; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
    "model, adapter, out = sys.argv[1:]\n"
    "network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)\n"
    "PeftModel.from_pretrained(network, adapter).merge_and_unload().save_pretrained(out)"
)
COPY = PEAK + "import shutil; shutil.copytree(sys.argv[1], sys.argv[3])"


def measure(folder: Path) -> list[Table]:
    """One row a tool and checkpoint."""
    speed, exact = [], []
    for name, config in (("llama", LLAMA), ("qwen3_moe", MOE)):
        model = make(config, folder / name)
        adapters = {"peft": of_peft(config, folder / "peft"), "mlx-lm": of_mlx_lm(config, folder / "mlx")}
        tools = {"copy": (COPY, "mlx-lm"), "mlx-finetune": (OURS, "mlx-lm"), "mlx_lm.fuse": (MLX_LM, "mlx-lm")}
        if name == "llama":
            tools |= {"mlx-finetune, adapter of peft": (OURS, "peft"), "peft merge_and_unload": (PEFT, "peft")}
        best, shares = compare(name, model, adapters, tools, folder / "out")
        of = {"peft": IMPORTS, "mlx-lm": IMPORTS + MLX_TOO}
        imports = {kind: min(timed(program, model, model, model)[0] for _ in range(ROUNDS)) for kind, program in of.items()}
        for tool, (seconds, megabytes) in best.items():
            row: dict[str, Any] = {"checkpoint and tool": f"{name}, {tool}", "s": seconds, "MB": megabytes}
            if tool.startswith("mlx-finetune"):
                took = imports[tools[tool][1]]
                row |= {"imports s": took, "copies beyond imports": (seconds - took) / best["copy"][0]}
                row |= {"within 2 copies": row["copies beyond imports"] <= MOST_COPIES} if name == "llama" else {}
                row |= {"within 450 MB": megabytes <= MOST_MB}
            speed.append(row)
        exact += [{"checkpoint and tool": f"{name}, {tool}", "not rounded once": share} for tool, share in shares.items()]
        for path in (model, *adapters.values()):
            shutil.rmtree(path)
    promised = ("within 2 copies", "within 450 MB")
    return [Table("Time and memory", TEXT, speed, promised=promised), Table("Exactness", EXACT, exact)]


def compare(
    name: str, model: Path, adapters: dict[str, Path], tools: dict[str, tuple[str, str]], out: Path
) -> tuple[dict[str, tuple[float, float]], dict[str, Any]]:
    """Best of each tool, in turn; and of its last result the share of numbers that are not rounded once."""
    best: dict[str, tuple[float, float]] = {}
    shares: dict[str, Any] = {}
    for _ in range(ROUNDS):
        for tool, (program, kind) in tools.items():
            seconds, megabytes = timed(program, model, adapters[kind], out)
            print(name, tool, f"{seconds:.1f} s, {megabytes:.0f} MB", file=sys.stderr)
            if tool != "copy":
                shares[tool] = not_rounded_once(model, out, adapters["mlx-lm"])
            shutil.rmtree(out)
            best[tool] = min(best.get(tool, (seconds, megabytes)), (seconds, megabytes))
    return best, shares


def timed(program: str, model: Path, adapter: Path, out: Path) -> tuple[float, float]:
    """Seconds, and most megabytes held, as the program itself says at its end."""
    began = time.perf_counter()
    command = [sys.executable, "-c", program, str(model), str(adapter), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    assert done.returncode == 0, done.stderr[-2000:]
    return seconds, int(done.stderr.split()[-1]) / 1e6


def factors(config: dict[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A [r, in] and B [out, r] of each linear weight but the head and routers, by the name of its tensor."""
    rng = np.random.default_rng(1)
    found = {}
    for name, shape in shapes(config):
        if len(shape) == 2 and ".layers." in name and not name.endswith("mlp.gate.weight"):
            a, b = (rng.standard_normal(size, np.float32) * 0.02 for size in ((RANK, shape[1]), (shape[0], RANK)))
            found[name] = a, b
    return found


def of_peft(config: dict[str, Any], folder: Path) -> Path:
    """As peft keeps it; of the mixture none is needed."""
    folder.mkdir()
    tensors: dict[str, np.ndarray] = {}
    for name, (a, b) in factors(config).items():
        at = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = sorted(name.removesuffix(".weight") for name in factors(config))
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK * SCALE, "target_modules": modules}
    write_json(folder / "adapter_config.json", settings | {"base_model_name_or_path": "base", "lora_dropout": 0.0})
    return folder


def of_mlx_lm(config: dict[str, Any], folder: Path) -> Path:
    """As mlx-lm keeps it: experts of a layer in one stack."""
    folder.mkdir()
    tensors: dict[str, np.ndarray] = {}
    stacks: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for name, (a, b) in factors(config).items():
        at = name.removesuffix(".weight")
        if ".experts." in at:
            layer, _, rest = at.partition(".experts.")
            stacks.setdefault(f"{layer}.switch_mlp.{rest.partition('.')[2]}", []).append((a, b))
        else:
            tensors |= {f"{at}.lora_a": np.ascontiguousarray(a.T), f"{at}.lora_b": np.ascontiguousarray(b.T)}
    for at, pairs in stacks.items():
        tensors |= {f"{at}.lora_a": np.stack([a for a, _ in pairs]), f"{at}.lora_b": np.stack([b for _, b in pairs])}
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    keys = sorted({name.rpartition(".")[0] for name in tensors})
    how = {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": keys}
    layers = config["num_hidden_layers"]
    write_json(folder / "adapter_config.json", {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": how})
    return folder


def not_rounded_once(model: Path, fused: Path, adapter: Path) -> float | str:
    """Share of the numbers of some matrices; a text where the fused folder has no such tensors."""
    before, after, given = tensor_headers(model), tensor_headers(fused), tensor_headers_of(adapter)
    names = [name for name in before if f"{name.removesuffix('.weight')}.lora_a" in given]
    wrong, count = 0, 0
    if not after.keys() >= before.keys():
        return "other tensors"
    for name in names[:: max(1, len(names) // LOOKED_AT)]:
        a, b = (read_float32(given[f"{name.removesuffix('.weight')}.{side}"]) for side in ("lora_a", "lora_b"))
        expected = read_float32(before[name]) + np.float32(SCALE) * (b.T @ a.T)
        found = read_float32(after[name])
        wrong += int((to_float32(from_float32(expected, "BF16"), "BF16").reshape(found.shape) != found).sum())
        count += found.size
    return wrong / count


def tensor_headers_of(adapter: Path) -> dict[str, Any]:
    """Of the one file of an adapter of mlx-lm."""
    from mlx_finetune.models.weights import file_headers

    return file_headers(adapter / "adapters.safetensors")


if __name__ == "__main__":
    run("fuse", str(__doc__), measure)
