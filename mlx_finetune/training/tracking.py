"""Trackers: programs that are told the rows of metrics.jsonl as they are written. Told: numbers and settings, no conversation."""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from mlx_finetune.config import RunConfig
from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json, write_json
from mlx_finetune.installed import versions
from mlx_finetune.training.journal import Row

PROJECT = "mlx-finetune"
IDENTITY = "tracked.json"  # in a run's folder: the id by which trackers know the run again
PLACES = ("data", "out", "adapter_path")  # settings that name folders of this machine: not told


class Tracker(Protocol):
    """One of trackers/. It is told the rows of the run from the first one on, also those of before where the run goes on."""

    def log(self, row: Row) -> None:
        """A row of metrics.jsonl; one that the tracker has already is not to be there twice."""

    def finish(self) -> None:
        """The run is over, or broken off."""


def check_trackers(config: RunConfig) -> None:
    """Raises UserError where one is not installed."""
    for name in config.report_to or ():
        if not versions([name]):
            raise UserError(f"report_to = {name}: it is not installed", hint=f"pip install 'mlx-finetune[{name}]'")


@contextmanager
def tracked(config: RunConfig, run: Path) -> Iterator[list[Tracker]]:
    """The trackers of a run, from `trackers/NAME.py`; they are told the end however it comes.

    Raises:
        UserError: one of them cannot begin.
    """
    trackers: list[Tracker] = []
    try:
        for name in config.report_to or ():
            trackers.append(import_module(f"mlx_finetune.training.trackers.{name}").begin(run, told(config)))
        yield trackers
    finally:
        for tracker in trackers:
            tracker.finish()


def told(config: RunConfig) -> dict[str, Any]:
    """The settings that a tracker shows: of folders on this machine only the model's own name."""
    settings = {name: value for name, value in config.to_dict().items() if name not in PLACES}
    return settings | {"model": Path(config.model).name if Path(config.model).is_absolute() else config.model}


def values_of(row: Row) -> dict[str, float]:
    """The numbers of a row by the names that trackers show: train/loss, valid/loss, valid/loss/gptme; none that is not finite."""
    numbers = {f"{row['split']}/{name}": float(value) for name, value in row.items() if name != "step" and _is_number(value)}
    sources = {source: loss for source, loss in row.get("by_source", {}).items() if _is_number(loss)}
    return numbers | {f"{row['split']}/loss/{source}": float(loss) for source, loss in sources.items()}


def identity(run: Path) -> str:
    """By which trackers know the run again, made at its first start; raises UserError where the file is damaged."""
    path = run / IDENTITY
    if not os.path.lexists(path):
        write_json(path, {"id": secrets.token_hex(6)})
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("id"), str):
        raise UserError(f"{path}: no id", hint="remove it: trackers then show the run as a new one")
    return str(found["id"])


def where_it_goes(config: RunConfig, run: Path, environment: Mapping[str, str] = os.environ) -> list[str]:
    """A sentence for each tracker: what it is told, and whether that leaves this machine."""
    said = []
    for name in config.report_to or ():
        if name == "tensorboard":
            said.append(f"tensorboard: the losses stand in {run / 'tensorboard'}, on this machine")
        elif name == "trackio":
            place = environment.get("TRACKIO_SPACE_ID") or environment.get("TRACKIO_SERVER_URL")
            said.append(_sent(name, place.partition("?")[0]) if place else "trackio: losses and settings stay on this machine")
        elif environment.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
            said.append(f"wandb: offline: losses and settings stay in {run / 'wandb'} until `wandb sync` sends them")
        else:
            said.append(_sent(name, environment.get("WANDB_BASE_URL", "wandb.ai")) + "; WANDB_MODE=offline keeps them here")
    return said


def _sent(name: str, place: str) -> str:
    return f"{name}: losses and settings, no conversation, are SENT to {place}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
