"""How long converting a checkpoint takes, and in how much memory: mlx-finetune convert against mlx_lm.convert.

    .venv/bin/python benchmarks/convert.py [--out FOLDER]

A random Llama of 1.34 GB in bfloat16, in four files, and a random Qwen3-MoE of 0.8 GB, each made by this script; each tool is a
program of its own, twice in turn, of which the faster counts. Takes 3 minutes of two cores and 4 GB of disk; writes convert.md and
convert.json; exit status 1 where a bound is broken.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tables import Table, run
from tiny_models import tiny_tokenizer

from mlx_finetune.files import write_json
from mlx_finetune.models.shards import Planned, ShardWriter, cut_into_shards
from mlx_finetune.models.weights import from_float32

TEXT = """\
Wall time and the kernel's high water mark of the process, Python's start and imports counted in. Both quantise the same layers
and write the same numbers, which the tests compare bit for bit; mlx-finetune ran without the comparison of logits, which mlx-lm
does not have, and waits until the files stand on the disk. Each ran
twice, in turn, for the machine was shared: the faster counts. Allowed are 1.5 times mlx-lm's time and its memory."""
ROUNDS = 2
TIME, MEMORY = 1.5, 1.0  # at most, as a share of mlx-lm's
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "max_position_embeddings": 2048, "head_dim": 64, "torch_dtype": "bfloat16", "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
EXPERTS = 32
MOE: dict[str, Any] = LLAMA | {
    "model_type": "qwen3_moe", "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "num_experts": EXPERTS,
    "num_experts_per_tok": 4, "moe_intermediate_size": 896, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "architectures": ["Qwen3MoeForCausalLM"],
}  # fmt: skip
TOOLS: dict[str, tuple[str, ...]] = {
    "mlx-lm": ("mlx_lm", "convert", "--hf-path", "{model}", "--mlx-path", "{out}"),
    "mlx-finetune": ("mlx_finetune", "convert", "{model}", "--out", "{out}", "--no-verify"),
}
PROGRAM = """
import atexit, runpy, sys
from mlx_finetune.engines import process_peak
atexit.register(lambda: print(process_peak(), file=sys.stderr))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
ASKED: dict[str, dict[str, tuple[str, ...]]] = {
    "4 bits": {"mlx-lm": ("-q", "--q-bits", "4"), "mlx-finetune": ("--bits", "4")},
    "float16": {"mlx-lm": ("--dtype", "float16"), "mlx-finetune": ("--dtype", "float16")},
}


def measure(folder: Path) -> list[Table]:
    """One row a checkpoint and kind."""
    rows = []
    for name, config, kinds in (("llama", LLAMA, ("4 bits", "float16")), ("qwen3_moe", MOE, ("4 bits",))):
        model = make(config, folder / name)
        rows += [compare(name, model, kind, folder / "out") for kind in kinds]
        shutil.rmtree(model)
    bounded = [row for row in rows if "float16" not in row["conversion"]]
    return [
        Table("Quantising", TEXT, [row | kept(row) for row in bounded], promised=("time within", "memory within")),
        Table("Rounding to another dtype", "The same, not quantised.", [row for row in rows if row not in bounded]),
    ]


def kept(row: dict[str, Any]) -> dict[str, bool]:
    """Whether both ratios are what they may be."""
    return {"time within": row["time over mlx-lm"] <= TIME, "memory within": row["memory over mlx-lm"] <= MEMORY}


def compare(name: str, model: Path, kind: str, out: Path) -> dict[str, Any]:
    """Best of both tools, in turn."""
    best: dict[str, tuple[float, float]] = {}
    for _ in range(ROUNDS):
        for tool, command in TOOLS.items():
            arguments = [part.format(model=model, out=out) for part in (*command, *ASKED[kind][tool])]
            seconds, gigabytes = timed(arguments[0], arguments[1:])
            print(name, kind, tool, f"{seconds:.1f} s, {gigabytes:.2f} GB", file=sys.stderr)
            shutil.rmtree(out)
            best[tool] = min(best.get(tool, (seconds, gigabytes)), (seconds, gigabytes))
    (theirs, their_memory), (ours, our_memory) = best["mlx-lm"], best["mlx-finetune"]
    return {
        "conversion": f"{name} to {kind}",
        "mlx-lm s": theirs,
        "mlx-finetune s": ours,
        "time over mlx-lm": ours / theirs,
        "mlx-lm GB": their_memory,
        "mlx-finetune GB": our_memory,
        "memory over mlx-lm": our_memory / their_memory,
    }


def timed(module: str, arguments: list[str]) -> tuple[float, float]:
    """Seconds, and most gigabytes held, as the program itself says at its end."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PROGRAM, module, *arguments], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    assert done.returncode == 0, done.stderr[-2000:]
    return seconds, int(done.stderr.split()[-1]) / 1e9


def make(config: dict[str, Any], folder: Path) -> Path:
    """A checkpoint in bfloat16, tensor by tensor."""
    folder.mkdir()
    tensors = {name: Planned("BF16", shape) for name, shape in shapes(config)}
    rng = np.random.default_rng(0)
    with ShardWriter(folder, cut_into_shards(tensors, 350_000_000), {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            values = rng.standard_normal(tensor.shape, np.float32) * 0.02 + (len(tensor.shape) == 1)
            writer.write(name, [from_float32(values, "BF16")])
    write_json(folder / "config.json", config)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama, or of a Qwen3-MoE, as Hugging Face has them."""
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    moe = config["model_type"] == "qwen3_moe"
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        for part, shape in (("q_proj", (q, width)), ("k_proj", (kv, width)), ("v_proj", (kv, width)), ("o_proj", (width, q))):
            yield f"{at}.self_attn.{part}.weight", shape
        for part in ("q_norm", "k_norm") if moe else ():
            yield f"{at}.self_attn.{part}.weight", (head,)
        if moe:
            yield f"{at}.mlp.gate.weight", (EXPERTS, width)
        inner = config["moe_intermediate_size"] if moe else inner
        for mlp in [f"mlp.experts.{e}" for e in range(EXPERTS)] if moe else ["mlp"]:
            yield f"{at}.{mlp}.gate_proj.weight", (inner, width)
            yield f"{at}.{mlp}.up_proj.weight", (inner, width)
            yield f"{at}.{mlp}.down_proj.weight", (width, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{norm}.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (config["vocab_size"], width)


if __name__ == "__main__":
    run("convert", str(__doc__), measure)
