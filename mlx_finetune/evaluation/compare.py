"""Base against tuned on the same held-out batches, by one engine: the base is the model with its adapter at zero."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_finetune.config import RunConfig, load_config, make_config
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.engines import Engine, choose_engine, open_engine
from mlx_finetune.engines.supported import for_a_look
from mlx_finetune.errors import UserError
from mlx_finetune.files import write_json
from mlx_finetune.models.hub import check_model_folder, model_folder
from mlx_finetune.models.weights import fingerprint
from mlx_finetune.training.checkpoint import Origin, check_origin, read_progress, resume
from mlx_finetune.training.held_out import HeldOut, held_out_loss
from mlx_finetune.training.memory_watch import loading
from mlx_finetune.training.run import check_mlx, check_names, check_settings


@dataclass(frozen=True)
class Comparison:
    """Held-out loss before and after, in nats a learned token."""

    checkpoint: str
    step: int
    engine: str
    base: HeldOut
    tuned: HeldOut
    note: str = ""  # how the base was read otherwise than in training

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def find_checkpoint(run: Path, name: str) -> Path:
    """`best`, `latest` or `step-000100` of a run.

    Raises:
        UserError: no such run or checkpoint.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run (no config.yaml)", hint="mlx-finetune train makes one")
    for folder in (run / name, run / "checkpoints" / name):
        if (folder / "progress.json").is_file():
            return folder.resolve()
    if damaged := [folder for folder in (run / name, run / "checkpoints" / name) if folder.exists() and name]:
        hint = "bring the file back, remove that folder, or name another --checkpoint"
        raise UserError(f"{damaged[0].resolve()}: no progress.json: not a whole checkpoint", hint)
    there = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    raise UserError(
        f"{run}: no checkpoint {name!r}", hint=f"there are {', '.join(there)}" if there else "train has not saved one yet"
    )


def open_run(run: Path, checkpoint: str, engine: str = "") -> tuple[RunConfig, Path, Path]:
    """Config (with `engine` put in where given), model folder and checkpoint folder of a run.

    Raises:
        UserError: no such checkpoint, or the model is not the one that it was trained on.
    """
    folder = find_checkpoint(run, checkpoint)
    config = load_config(run / "config.yaml", {})
    check_settings(folder, config)
    if engine:
        config = make_config(config.to_dict() | {"engine": engine}, "--engine")
    model, progress = model_folder(config.model), read_progress(folder)
    check_model_folder(model)
    check_origin(folder, progress, Origin(data=str(progress.get("data")), model=fingerprint(model)))
    return config, model, folder


def open_tuned(config: RunConfig, model: Path, dataset: Dataset, checkpoint: Path) -> Engine:
    """An engine with the checkpoint in it; raises UserError where model or data are not those it was trained on."""
    if (name := choose_engine(config.engine)) == "mlx":
        check_mlx(model, dataset)
    config = for_a_look(config, name)
    with loading(model):
        engine = open_engine(config, model)
        check_names(engine, model)
        resume(checkpoint, engine, config, Origin(data=dataset.id, model=fingerprint(model)))
    return engine


def _note(config: RunConfig, engine: str) -> str:
    if for_a_look(config, engine).quantization == config.quantization:
        return ""
    return f"both on the base as it is stored; training had it in {config.quantization}"


def compare(run: Path, checkpoint: str = "best", engine: str = "") -> tuple[Comparison, Engine]:
    """Writes `evaluation.json` into the run, by the run's own engine unless another is named; it is given back tuned.

    Raises:
        UserError: the run has no such checkpoint, or nothing was held out.
    """
    config, model, folder = open_run(run, checkpoint, engine)
    dataset = Dataset.open(Path(config.data))
    held_out = dataset.held_out(config.batch_size)
    if not held_out:
        raise UserError(f"{dataset.folder}: nothing was held out", hint="prepare two or more conversations, with a valid_fraction")
    opened = open_tuned(config, model, dataset, folder)
    tuned, state = held_out_loss(opened, held_out), opened.state()
    opened.load_state(opened.initial(), step=0)
    base = held_out_loss(opened, held_out)
    step = int(read_progress(folder)["step"])
    opened.load_state(state, step)
    comparison = Comparison(folder.name, step, opened.name, base, tuned, _note(config, opened.name))
    write_json(run / "evaluation.json", comparison.to_json())
    return comparison, opened
