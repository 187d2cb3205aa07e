"""Runs of a few steps on tiny models, for what is handed back of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_models import make_tiny

from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Conversation, Message, write_conversations
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.training.run import execute, plan_run

WORDS = "quokka lantern"  # in every conversation: it must not be found in what is handed back


def conversations() -> list[Conversation]:
    """Two of three from gptme."""
    made = []
    for i in range(9):
        turns = [Message("system", "You are gptme."), Message("user", f"{WORDS} list {i}")]
        turns.append(Message("assistant", f"```shell\nls -{'l' * (i % 5)} {WORDS}\n```"))
        source = "openassistant" if i % 3 == 0 else "gptme"
        made.append(Conversation(tuple(turns), source, f"log-{i}", "MIT"))
    return made


def make_data(model: Path, folder: Path) -> Path:
    """A prepared folder for the model."""
    write_conversations(folder / "gptme.jsonl", conversations())
    told = {"max_length": 256, "valid_fraction": 0.3, "validation_by": "hash", "openassistant_share": 0.6}
    prepare([folder / "gptme.jsonl"], ChatTemplate.load(model), make_config(told, "test"), folder / "dataset", {"model": "m"})
    return folder / "dataset"


def make_base(root: Path, model_type: str = "llama", **how: Any) -> Path:
    """The model root/base with a card and a licence, and root/dataset for it."""
    base = make_tiny(model_type, root / "base", tokenizer=True, **how)
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Base\n\nWhat its makers say.\n")
    (base / "LICENSE").write_text("Apache License 2.0")
    make_data(base, root)
    return base


def make_run(root: Path, engine: str, out: str = "run", **values: Any) -> Path:
    """The folder root/out, of four steps that change root/base visibly."""
    told: dict[str, Any] = {"model": str(root / "base"), "data": str(root / "dataset"), "out": str(root / out), "engine": engine}
    told |= {"steps": 4, "batch_size": 2, "gradient_accumulation": 1, "learning_rate": 1e-2, "eval_every": 2, "save_every": 2}
    told |= {"sample_prompts": 0}
    if values.get("fine_tune_type") != "full":
        told |= {"rank": 4, "alpha": 8}
    plan = plan_run(make_config(told | values, "test"))
    execute(plan, lambda done, steps, note: None)
    return plan.run


def as_of_old(checkpoint: Path, change: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> Path:
    """The checkpoint as versions without a manifest wrote it, `progress.json` changed."""
    (checkpoint / "manifest.json").unlink()
    progress = json.loads((checkpoint / "progress.json").read_text())
    (checkpoint / "progress.json").write_text(json.dumps(change({n: v for n, v in progress.items() if n != "format"})))
    return checkpoint


def runs_of_both(root: Path, context: int) -> dict[str, Path]:
    """A run of each engine, whose model takes `context` tokens and answers otherwise than its base."""
    make_base(root, changes={"max_position_embeddings": context})
    return {engine: make_run(root, engine, engine, learning_rate=5e-2, steps=6) for engine in ("mlx", "torch")}
