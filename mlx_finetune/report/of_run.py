"""Everything about a run that stands on its disk, and in words what is not there."""

import shlex
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from mlx_finetune.config import RunConfig, load_config
from mlx_finetune.data.dataset import Dataset, digest_of
from mlx_finetune.data.prepare import NOT_CONVERSATIONS
from mlx_finetune.errors import UserError
from mlx_finetune.export.facts import base_name
from mlx_finetune.report.files_of_run import (
    EVALUATION,
    METRICS,
    Answer,
    Collected,
    Evaluation,
    Prepared,
    Progress,
    read_answers,
    read_as,
    read_losses,
)
from mlx_finetune.serving.defaults import HOST, PORT
from mlx_finetune.serving.trained import gptme_command, read_trained, served_name
from mlx_finetune.training.checkpoint import trained_template
from mlx_finetune.training.loop import total_steps
from mlx_finetune.training.patience import out_of_patience
from mlx_finetune.training.samples import SAMPLES


@dataclass(frozen=True)
class OfRun:
    """What a report says, before it is laid out."""

    run: Path
    config: RunConfig
    base: str  # id on the Hub, or name of the model's folder
    train: list[dict[str, Any]]  # lines of metrics.jsonl
    valid: list[dict[str, Any]]
    steps: int | None  # in all; None where the data is gone
    day: date | None  # of the last line
    checkpoint: str  # empty where none is saved yet
    progress: Progress  # of that checkpoint
    evaluation: Evaluation | None
    answers: list[Answer]
    dataset: Dataset | None
    prepared: Prepared | None
    data_gone: str  # why there is no `dataset`
    collected: Collected | None
    gptme: str  # with which it asks a server of the run as its conversations were had; empty where they are not there any more

    @property
    def typed(self) -> str:
        """Its folder, as it is typed in a shell."""
        return shlex.quote(str(self.run))

    @property
    def done(self) -> int:
        """Steps so far."""
        return int(self.train[-1]["step"]) if self.train else 0

    @property
    def finished(self) -> bool:
        """Whether it came to its end; where that cannot be told, what there is counts as all."""
        return self.steps is None or self.done >= self.steps or self.stopped_early is not None

    @property
    def stopped_early(self) -> str | None:
        """Why, where its patience was at its end."""
        return out_of_patience(((row["step"], row["loss"]) for row in self.valid if row["step"]), self.config.patience)


def of_run(run: Path) -> OfRun:
    """Reads a run folder, also of a run that is still going.

    Raises:
        UserError: it is none, or a file in it is damaged.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run (no config.yaml)", hint="mlx-finetune train makes one")
    config = load_config(run / "config.yaml", {})
    train, valid = read_losses(run / METRICS)
    evaluation, again = run / EVALUATION, f"mlx-finetune evaluate {run} writes it again"
    found = read_as(Evaluation, evaluation, again) if evaluation.is_file() else None
    checkpoint = _checkpoint(run, found)
    progress = read_as(Progress, checkpoint / "progress.json", "remove that checkpoint") if checkpoint else Progress()
    dataset, prepared, gone = _data(config, progress)
    return OfRun(
        run=run,
        config=config,
        base=base_name(config.model, Path(config.model))[0],
        train=train,
        valid=valid,
        steps=total_steps(dataset, config) if dataset else config.steps,
        day=date.fromtimestamp((run / METRICS).stat().st_mtime) if train or valid else None,
        checkpoint=checkpoint.name if checkpoint else "",
        progress=progress,
        evaluation=found,
        answers=read_answers(run / SAMPLES),
        dataset=dataset,
        prepared=prepared,
        data_gone=gone,
        collected=_collected(dataset, prepared),
        gptme=_gptme(run, config) if dataset else "",
    )


def _checkpoint(run: Path, evaluation: Evaluation | None) -> Path | None:
    """The one that was evaluated, else the best, else the latest."""
    named = [run / "checkpoints" / evaluation.checkpoint] if evaluation and evaluation.checkpoint else []
    whole = [folder for folder in (*named, run / "best", run / "latest") if (folder / "progress.json").is_file()]
    return whole[0].resolve() if whole else None


def _data(config: RunConfig, progress: Progress) -> tuple[Dataset | None, Prepared | None, str]:
    """The prepared folder; where it is gone or another one now, why."""
    try:
        dataset = Dataset.open(Path(config.data))
    except UserError as error:
        return None, None, error.message
    if progress.data not in ("", dataset.info.get("id")):
        return None, None, f"{dataset.folder}: prepared anew since this run learned from it"
    return dataset, read_as(Prepared, dataset.folder / "dataset.json", "run mlx-finetune prepare again"), ""


def _collected(dataset: Dataset | None, prepared: Prepared | None) -> Collected | None:
    """What `collect` said, where its folder lies beside the prepared one and is still what that was made of."""
    if dataset is None or prepared is None:
        return None
    for told in sorted(dataset.folder.resolve().parent.glob("*/collect.json")):
        files = sorted(path for path in told.parent.glob("*.jsonl") if path.name not in NOT_CONVERSATIONS)
        if files and digest_of(files) == prepared.conversations:
            return read_as(Collected, told, "run mlx-finetune collect again")
    return None


def _gptme(run: Path, config: RunConfig) -> str:
    name = served_name(config.model, run, trained_template(run))
    return gptme_command(name, read_trained(config), f"http://{HOST}:{PORT}")
