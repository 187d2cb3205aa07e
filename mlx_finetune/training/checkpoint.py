"""A checkpoint is a PEFT adapter, the optimizer's moments, and one integer. It appears whole or not at all."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mlx_finetune.config import RunConfig
from mlx_finetune.engines import Arrays, Engine
from mlx_finetune.engines.adapter import HEAD, PEFT_PREFIX, peft_config, peft_tensors
from mlx_finetune.engines.experts import from_peft, holds_experts
from mlx_finetune.engines.optimizers import SCALES, state_shapes
from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_folder, read_json, write_json
from mlx_finetune.installed import PACKAGES, versions

TEMPLATE = "chat_template.jinja"  # in a run's folder: the chat template with which its data was rendered
ADAPTER, WEIGHTS = "adapter_model.safetensors", "model.safetensors"  # the latter where the weights themselves are trained
DAMAGED = "remove this folder to go on from the one before"


@dataclass(frozen=True)
class Origin:
    """What a run learns from; a checkpoint goes on only with the same."""

    data: str  # id of the data set
    model: str  # fingerprint of the base model


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands."""
    return run / "checkpoints" / f"step-{step:06d}"


def trained_template(run: Path) -> str:
    """The chat template with which the data of the run was rendered; empty where the run does not know it."""
    path = run / TEMPLATE
    return path.read_bytes().decode() if path.is_file() else ""


def save_checkpoint(run: Path, engine: Engine, step: int, config: RunConfig, origin: Origin) -> Path:
    """Writes the folder atomically and points `latest` at it."""
    folder, state = checkpoint_folder(run, step), engine.state()
    if not all(np.isfinite(array).all() for array in state.values()):
        raise UserError(
            f"step {step}: a weight is not a finite number, nothing was saved", hint="start a new run with a lower learning_rate"
        )
    with atomic_folder(folder) as temporary:
        trained = {n.removeprefix("adapter/"): a for n, a in state.items() if n.startswith("adapter/")}
        if engine.targets:
            save_file(peft_tensors(trained, engine.targets), temporary / ADAPTER, metadata={"format": "pt"})
            write_json(temporary / "adapter_config.json", peft_config(engine.targets, config, config.model))
        else:
            save_file(trained, temporary / WEIGHTS, metadata={"format": "pt"})
        moments = {n: a for n, a in state.items() if not n.startswith("adapter/")}
        save_file(moments, temporary / "optimizer.safetensors", metadata={"format": "np"})
        write_json(temporary / "progress.json", _progress(step, engine, config, origin))
        for file in temporary.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    point(run / "latest", folder)
    return folder


def point(link: Path, folder: Path) -> None:
    """A relative symbolic link, replaced atomically."""
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.relative_to(link.parent))
    temporary.replace(link)


def load_checkpoint(folder: Path, moments: bool = True) -> tuple[Arrays, dict[str, Any]]:
    """The engine's state, without those of the optimizer where `moments` is false, and `progress.json`.

    Raises:
        UserError: the folder is not a whole checkpoint.
    """
    progress = read_progress(folder)
    try:
        is_adapter = (folder / ADAPTER).exists()
        trained = load_file(folder / (ADAPTER if is_adapter else WEIGHTS))
        of_optimizer = load_file(folder / "optimizer.safetensors") if moments else {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: not a whole checkpoint: {error}", hint=DAMAGED) from error
    trained = {name.removeprefix(PEFT_PREFIX): array for name, array in trained.items()}
    if is_adapter and holds_experts(trained):
        trained = from_peft(trained, read_json(folder / "adapter_config.json"))
    return {f"adapter/{name}": array for name, array in trained.items()} | of_optimizer, progress


def read_progress(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; raises UserError where that is damaged."""
    progress = read_json(folder / "progress.json")
    if not isinstance(progress, dict) or not isinstance(progress.get("step"), int):
        raise UserError(f"{folder}/progress.json: not a checkpoint's", hint=DAMAGED)
    return progress


def resume(folder: Path, engine: Engine, config: RunConfig, origin: Origin) -> int:
    """Puts the checkpoint into the engine and says how many steps are done.

    Raises:
        UserError: it was trained on other data, on another model, or its adapter has other shapes.
    """
    state, progress = load_checkpoint(folder)
    check_origin(folder, progress, origin)
    shapes = state_shapes(config, engine.trained)
    # What a head that is the embeddings has, and scales of moments in 8 bits, follow from the rest.
    state = {n: a for n, a in state.items() if n in shapes or not (n.startswith(f"adapter/{HEAD}.") or f"{SCALES}/" in n)}
    shapes = {name: shape for name, shape in shapes.items() if name in state or f"{SCALES}/" not in name}
    if {name: array.shape for name, array in state.items()} != shapes:
        raise UserError(f"{folder}: its adapter has other shapes than this run's", hint="start a new run with another --out")
    engine.load_state(state, progress["step"])
    return int(progress["step"])


def check_origin(folder: Path, progress: dict[str, Any], origin: Origin) -> None:
    """Raises UserError where the checkpoint comes from other data or another model."""
    for name, now in vars(origin).items():
        then = progress.get(name)
        if then != now:
            before = progress.get("config", {}).get(name)
            hint = f"it was trained with --{name} {before}; for another, start a new run with another --out"
            raise UserError(f"{folder}: trained with {name} {then}, this is {name} {now}", hint=hint)


def _progress(step: int, engine: Engine, config: RunConfig, origin: Origin) -> dict[str, Any]:
    return {
        "step": step,
        "seed": config.seed,
        **vars(origin),
        "engine": engine.name,
        "device": engine.device,
        "versions": versions(PACKAGES),
        "config": config.to_dict(),
    }
