"""What portability.py measures: a run of each kind moved between the engines, and adapters of peft and mlx-lm as starts of runs."""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from safetensors.numpy import load_file, save_file
from short_runs import cut_after, losses, settings
from short_runs import run as whole_run
from tables import ENGINES, Figures, distance
from test_portable import KINDS, MLX_LM, PEFT, mlx_lm_adapter, peft_adapter, tensors_of

import mlx_finetune.engines.mlx  # noqa: F401  before MLX is imported: its fast BLAS
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.sources.openassistant import SOURCE as OPENASSISTANT
from mlx_finetune.training.run import execute, plan_resume

HALF = 5  # of ten steps
KINDS_OF_MLX_LM = ("lora", "dora")
LEAVES = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight", "m": ".lora_magnitude_vector"}  # mlx-lm's and peft's


def moved(kind: str, model: Path, data: Path, folder: Path) -> tuple[list[Figures], list[Figures]]:
    """Rows of a kind of run: begun on one engine and run on from step 5 on the other, and on the same."""
    whole = {engine: whole_run(settings(model, data, folder / engine, engine, **KINDS[kind])) for engine in ENGINES}
    between, same = [], []
    for engine, other in (ENGINES, ENGINES[::-1]):
        run = resumed(whole[engine], folder / f"{engine}-to-{other}", other)
        between.append({"kind of run": kind, "from": engine, "to": other} | apart(whole[engine], run))
        run = resumed(whole[engine], folder / f"{engine}-again", engine)
        expected, found = tensors_of(whole[engine]), tensors_of(run)
        equal = expected.keys() == found.keys() and all(np.array_equal(expected[name], found[name]) for name in expected)
        exact = distance(whole[engine], run) == 0.0
        same.append({"kind of run": kind, "engine": engine, "losses bit-identical": exact, "all arrays bit-identical": equal})
    return between, same


def apart(whole: Path, run: Path) -> Figures:
    """Largest differences of a run that moved from one that did not, in the steps after it."""
    found = {}
    for name, split, later in (("training loss", "train", HALF), ("held-out loss", "valid", 2)):  # held out: at 0, 4, 8 and 10
        expected, measured = (np.array(losses(one, split)[later:]) for one in (whole, run))
        assert len(expected) == len(measured) > 1
        found[name] = float(np.abs(expected - measured).max())
    return found


def resumed(run: Path, copy: Path, engine: str) -> Path:
    """The run as a crash after step 5 leaves it, run on by `engine`."""
    plan = plan_resume(cut_after(run, HALF, copy), {"engine": engine})
    execute(plan, lambda done, steps, note: None)
    return plan.run


def started(made_by: str, kind: str, model: Path, data: Path, folder: Path) -> Figures:
    """A row: the first held-out loss of runs from an adapter, less what peft, or mlx-lm, computes with it.

    As a share of the loss, which a sum over hundreds of tokens is.
    """
    if made_by == "peft":
        adapter, _ = peft_adapter(model, folder / "adapter", **PEFT[kind])
        by_peft = loss_by_peft(model, adapter, data)
    else:
        adapter, _ = mlx_lm_adapter(model, kind, folder / "adapter")
        by_peft = loss_by_peft(model, in_peft_words(adapter, kind, folder / "peft"), data)
    row: Figures = {"adapter": f"{made_by}, {kind}", "loss by peft": f"{by_peft:.6f}"}
    for engine in ENGINES:
        values = settings(model, data, folder / engine, engine, adapter_path=str(adapter), steps=1)
        first = losses(whole_run({n: v for n, v in values.items() if n not in ("rank", "alpha")}), "valid")[0]
        row[f"{engine} off by"] = abs(first / by_peft - 1)
    if made_by == "mlx-lm":
        row["mlx-lm off by"] = abs(loss_by_mlx_lm(model, adapter, data) / by_peft - 1)
    return row | {"without the adapter": f"{loss_by_peft(model, None, data):.6f}"}


def loss_by_peft(model: Path, adapter: Path | None, data: Path) -> float:
    """Mean over the held-out tokens, by transformers with an adapter that peft loads."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    opened = PeftModel.from_pretrained(base, adapter) if adapter else base
    with torch.no_grad():
        return held_out(data, lambda tokens: opened(torch.from_numpy(tokens[None]).long()).logits[0].numpy())


def loss_by_mlx_lm(model: Path, adapter: Path, data: Path) -> float:
    """The same by mlx-lm, its own loaders and its own layers."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    opened = load_adapters(load_model(model)[0], str(adapter))
    opened.eval()
    return held_out(data, lambda tokens: np.array(opened(mx.array(tokens[None]))[0]))


def held_out(data: Path, logits: Any) -> float:
    """Nats a learned token of a person's own held-out conversations, without our batches and our loss: one by one, in float64."""
    total = weight = 0.0
    for example in Dataset.open(data).valid:
        if example.source == OPENASSISTANT:
            continue
        found = logits(example.tokens).astype(np.float64)[:-1]
        found -= found.max(-1, keepdims=True)
        found -= np.log(np.exp(found).sum(-1, keepdims=True))
        chosen = np.take_along_axis(found, example.tokens[1:, None].astype(np.int64), -1)[:, 0]
        total, weight = total - float((chosen * example.weights[1:]).sum()), weight + float(example.weights[1:].sum())
    return total / weight


def in_peft_words(adapter: Path, kind: str, folder: Path) -> Path:
    """mlx-lm's adapter as peft reads it: matrices the other way round, alpha = scale * rank."""
    from peft import LoraConfig

    how = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [2, 3], "use_dora": kind == "dora"}
    rank = MLX_LM["rank"]
    LoraConfig(r=rank, lora_alpha=MLX_LM["scale"] * rank, task_type="CAUSAL_LM", **how).save_pretrained(folder)
    arrays = {}
    for name, array in load_file(adapter / "adapters.safetensors").items():
        module, _, leaf = name.rpartition(".")
        arrays[f"base_model.model.{module}{LEAVES[leaf]}"] = np.ascontiguousarray(array.T)
    save_file(arrays, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
