"""A checkpoint is a PEFT adapter, the optimizer's moments, and one integer. It appears whole or not at all."""

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
from mlx_finetune.files import atomic_folder, read_json, sync, sync_folder, write_json
from mlx_finetune.installed import PACKAGES, versions
from mlx_finetune.training.manifest import DAMAGED, FORMAT, MOMENTS, PROGRESS, check_whole, write_manifest
from mlx_finetune.training.memory_watch import again, memory_errors

TEMPLATE = "chat_template.jinja"  # in a run's folder: the chat template with which its data was rendered
ADAPTER, WEIGHTS = "adapter_model.safetensors", "model.safetensors"  # the latter where the weights themselves are trained
JOURNALS = ("metrics.jsonl", "samples.jsonl")  # a checkpoint stands on the disk after what was measured up to it


@dataclass(frozen=True)
class Origin:
    """What a run learns from; a checkpoint goes on only with the same."""

    data: str  # id of the data set
    model: str  # fingerprint of the base model
    adapter: str = ""  # SHA-256 of the weights of the adapter that it began with; empty without one


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands."""
    return run / "checkpoints" / f"step-{step:06d}"


def trained_template(run: Path) -> str:
    """The chat template with which the data of the run was rendered; empty where the run does not know it."""
    path = run / TEMPLATE
    return path.read_bytes().decode() if path.is_file() else ""


def save_checkpoint(run: Path, engine: Engine, step: int, config: RunConfig, origin: Origin) -> Path:
    """Writes the folder atomically and points `latest` at it.

    Raises:
        UserError: a weight is not a finite number, or there is no memory or no room for it; what was saved before stays whole.
    """
    folder = checkpoint_folder(run, step)
    try:
        with memory_errors(step, config):
            _save(folder, engine, step, config, origin)
        point(run / "latest", folder)
    except (OSError, SafetensorError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        hint = f"what was saved before is whole: make room, then {again(str(run))}"
        raise UserError(f"{folder}: cannot be saved: {said}", hint=hint) from error
    return folder


def _save(folder: Path, engine: Engine, step: int, config: RunConfig, origin: Origin) -> None:
    state = engine.state()
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
        save_file(moments, temporary / MOMENTS, metadata={"format": "np"})
        write_json(temporary / PROGRESS, _progress(step, engine, config, origin))
        write_manifest(temporary)
        journals = (folder.parents[1] / name for name in JOURNALS)
        for file in (*temporary.iterdir(), *(path for path in journals if path.is_file())):
            sync(file)


def point(link: Path, folder: Path) -> None:
    """A relative symbolic link, replaced atomically."""
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.relative_to(link.parent))
    temporary.replace(link)
    sync_folder(link.parent)


def load_checkpoint(folder: Path, moments: bool = True) -> tuple[Arrays, dict[str, Any]]:
    """The engine's state, without those of the optimizer where `moments` is false, and `progress.json`.

    Raises:
        UserError: the folder is not a whole checkpoint, as it was saved.
    """
    progress = check_whole(folder, moments)
    try:
        is_adapter = (folder / ADAPTER).exists()
        trained = load_file(folder / (ADAPTER if is_adapter else WEIGHTS))
        of_optimizer = load_file(folder / MOMENTS) if moments else {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: not a whole checkpoint: {error}", hint=DAMAGED) from error
    trained = {name.removeprefix(PEFT_PREFIX): array for name, array in trained.items()}
    if is_adapter and holds_experts(trained):
        trained = from_peft(trained, read_json(folder / "adapter_config.json"))
    return {f"adapter/{name}": array for name, array in trained.items()} | of_optimizer, progress


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
    engine.load_state(state, _updates(folder, progress))
    return int(progress["step"])


def _updates(folder: Path, progress: dict[str, Any]) -> int:
    """How many of the steps were applied: in checkpoints of format 1 all."""
    step, updates = progress["step"], progress.get("updates", progress["step"])
    if type(updates) is not int or not 0 <= updates <= step:
        raise UserError(f"{folder}/{PROGRESS}: updates {updates!r:.40} of {step} steps", hint=DAMAGED)
    return updates


def check_origin(folder: Path, progress: dict[str, Any], origin: Origin) -> None:
    """Raises UserError where the checkpoint comes from other data or another model."""
    for name, now in (("data", origin.data), ("model", origin.model)):
        then = progress.get(name)
        if then != now:
            before = progress.get("config", {}).get(name)
            hint = f"it was trained with --{name} {before}; for another, start a new run with another --out"
            raise UserError(f"{folder}: trained with {name} {then}, this is {name} {now}", hint=hint)


def _progress(step: int, engine: Engine, config: RunConfig, origin: Origin) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": step,
        "updates": engine.updates,
        "seed": config.seed,
        **vars(origin),
        "engine": engine.name,
        "device": engine.device,
        "versions": versions(PACKAGES),
        "config": config.to_dict(),
    }
