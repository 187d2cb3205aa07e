"""Runs of ten steps on a tiny model, and what they leave."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Conversation, Message, write_conversations
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.training.metrics import read_metrics
from mlx_finetune.training.run import execute, plan_run

STEPS = 10


def conversations(count: int, word: str = "ls") -> list[Conversation]:
    """Made to differ in length and content; two of three from gptme."""
    made = []
    for i in range(count):
        turns = [Message("system", "You are gptme.")]
        for turn in range(i % 3 + 1):
            turns += [
                Message("user", f"list {i} {turn}"),
                Message("assistant", f"```shell\n{word} -{'l' * (i % 5)} dir{turn}\n```"),
            ]
        source = "openassistant" if i % 3 == 0 else "gptme"
        made.append(Conversation(tuple(turns), source, f"log-{word}-{i}", "MIT"))
    return made


def prepared(model: Path, folder: Path, word: str) -> Path:
    write_conversations(folder / "gptme.jsonl", conversations(15, word))
    told = {"max_length": 512, "valid_fraction": 0.2, "validation_by": "hash", "openassistant_share": 0.6}
    config = make_config(told, "test")
    prepare([folder / "gptme.jsonl"], ChatTemplate.load(model), config, folder / "dataset", {})
    return folder / "dataset"


def settings(model: Path, data: Path, out: Path, engine: str, **values: Any) -> dict[str, Any]:
    places = {"model": str(model), "data": str(data), "out": str(out), "engine": engine}
    shape: dict[str, Any] = {"batch_size": 2, "gradient_accumulation": 2, "steps": STEPS, "learning_rate": 1e-2}
    if values.get("fine_tune_type") != "full":
        shape |= {"rank": 4, "alpha": 8}
    return places | shape | {"eval_every": 4, "save_every": 5, "warmup_ratio": 0.2, "sample_prompts": 0} | values


def run(values: dict[str, Any]) -> Path:
    plan = plan_run(make_config(values, "test"))
    execute(plan, lambda done, steps, note: None)
    return plan.run


def tensors(run: Path, step: int) -> dict[str, np.ndarray]:
    folder = run / "checkpoints" / f"step-{step:06d}"
    return load_file(folder / "adapter_model.safetensors") | load_file(folder / "optimizer.safetensors")


def losses(run: Path, split: str) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["split"] == split]


def cut_after(run: Path, step: int, copy: Path) -> Path:
    """The run as a crash after `step` would leave it: later checkpoints gone, later metrics still there."""
    shutil.copytree(run, copy, symlinks=True)
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return copy
