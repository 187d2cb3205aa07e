"""Trained on 4-bit weights, handed back: held-out loss of each way, and the answer of the GGUF in llama.cpp.

    .venv/bin/python benchmarks/qlora.py [--out FOLDER]

SmolLM2-135M-Instruct, one epoch on the embedded sample with MLX. Takes 12 minutes of two cores; writes qlora.md and qlora.json;
exit status 1 where a promise is broken.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from llama_cpp import opened
from tables import Table, run, sample_data

from mlx_finetune.config import RunConfig, make_config
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.engines import open_engine
from mlx_finetune.export.adapter_folder import export_adapter
from mlx_finetune.export.convert import How, convert
from mlx_finetune.export.fuse import fuse, fuse_into
from mlx_finetune.export.gguf_write import write_gguf
from mlx_finetune.export.quantised_base import changes_from_packed, unpacked
from mlx_finetune.models.gguf import find_smollm2, gguf_to_hugging_face
from mlx_finetune.models.importing import find_source
from mlx_finetune.models.quantisation import Quantisation
from mlx_finetune.training.held_out import held_out_loss
from mlx_finetune.training.run import execute, plan_run

TEXT = """\
Mean loss of the learned tokens of the held-out gptme logs, nats, in float32. The base was quantised to 4 bits in groups of 64 and
trained as its own weights unpacked to float32, since MLX's quantised products are slow on a Linux CPU; a row of 48 tokens says how
far the two lie apart. `mlx_lm.fuse` is run as it is by default: it quantises again what it has added."""
GGUF = """\
The fused model as q8_0, run by llama.cpp on the beginning of a sentence, greedily, beside transformers with the fused weights."""
PROMPT = "The capital of France is"
SETTINGS: dict[str, Any] = {
    "engine": "mlx",
    "rank": 8,
    "alpha": 16,
    "learning_rate": 1e-3,
    "batch_size": 1,
    "gradient_accumulation": 2,
}
SETTINGS |= {"epochs": 1, "eval_every": 1000, "save_every": 1000, "sample_prompts": 0}
FOUR = Quantisation(bits=4, group_size=64)


def measure(folder: Path) -> list[Table]:
    """The losses, and the answers."""
    model, packed, twin = folder / "smollm2", folder / "packed", folder / "unpacked"
    gguf_to_hugging_face(find_smollm2(), model)
    convert(find_source(str(model)), packed, How(FOUR, verify=False), lambda done, total: None)
    twin.mkdir()
    fuse_into(model, packed, twin, None, unpacked(model, packed))
    data = sample_data(model, folder / "data")
    plan = plan_run(make_config(SETTINGS | {"model": str(twin), "data": str(data), "out": str(folder / "run")}, "benchmark"))
    execute(plan, lambda done, steps, note: None)
    checkpoint = (folder / "run" / "latest").resolve()
    folders = {"original, untrained": model, "4 bits, untrained": twin} | fused(model, packed, twin, checkpoint, folder)
    losses = {name: held_out(path, plan.config, data) for name, path in folders.items()}
    trained = losses["4 bits, as trained (--quantised-base)"]
    rows: list[dict[str, Any]] = []
    for name, loss in losses.items():
        promised = {"no worse than as trained": loss <= trained} if name == ORIGINAL else {}
        rows.append({"model": name, "held-out loss": loss, "from as trained": loss - trained, **promised})
    apart = [{"unpacked against packed": "48 tokens", "largest logit difference, relative": packed_apart(packed, twin)}]
    return [
        Table("Held-out loss", TEXT, rows, promised=("no worse than as trained",)),
        Table("Packed and unpacked", "The same weights.", apart, {"largest logit difference, relative": 1e-3}),
        Table("In llama.cpp", GGUF, [answers(folders[ORIGINAL], folder)], promised=("says Paris",)),
    ]


ORIGINAL = "fused into the original"


def fused(model: Path, packed: Path, twin: Path, checkpoint: Path, folder: Path) -> dict[str, Path]:
    """By what was done: the folder."""
    made = {"4 bits, as trained (--quantised-base)": folder / "exact", ORIGINAL: folder / "original"}
    exact, original = made.values()
    exact.mkdir()
    fuse_into(model, checkpoint, exact, None, changes_from_packed(model, packed, checkpoint))
    fuse(model, checkpoint, original)
    export_adapter(twin, checkpoint, folder / "adapter", "mlx-lm")
    again = folder / "again"
    program = [sys.executable, "-m", "mlx_lm.fuse", "--model", str(packed), "--adapter-path", str(folder / "adapter")]
    subprocess.run([*program, "--save-path", str(again)], check=True, capture_output=True)
    made["mlx_lm.fuse"] = folder / "again unpacked"
    made["mlx_lm.fuse"].mkdir()
    fuse_into(model, checkpoint, made["mlx_lm.fuse"], None, unpacked(model, again))
    return made


def held_out(model: Path, config: RunConfig, data: Path) -> float:
    """Mean loss of a folder without any adapter's effect: B of a fresh one is zero."""
    print(model.name, file=sys.stderr)
    engine = open_engine(config.model_copy(update={"model": str(model)}), model)
    return held_out_loss(engine, Dataset.open(data).held_out(config.batch_size)).loss


def packed_apart(packed: Path, twin: Path) -> float:
    """Over the largest logit."""
    import mlx.core as mx

    from mlx_finetune.engines.mlx.load import load_model

    tokens = mx.array(np.random.default_rng(1).integers(3, 40_000, size=(1, 48)))
    one, other = (np.array(load_model(folder, "float32")(tokens).astype(mx.float32)) for folder in (packed, twin))
    return float(np.abs(one - other).max() / np.abs(other).max())


def answers(model: Path, folder: Path) -> dict[str, Any]:
    """Of llama.cpp with q8_0, and of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = folder / "model.gguf"
    write_gguf(model, file, "q8_0")
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = tokenizer(PROMPT)["input_ids"]
    with opened(file) as llama:
        answer = tokenizer.decode(llama.greedy(prompt, 6))
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = network.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
    return {
        "prompt": PROMPT,
        "llama.cpp": repr(answer),
        "transformers": repr(tokenizer.decode(theirs)),
        "says Paris": "Paris" in answer,
    }


if __name__ == "__main__":
    run("qlora", str(__doc__), measure)
