"""metrics.jsonl: one line a training step, one a held-out loss. Trackers are told the same rows."""

from collections.abc import Sequence
from pathlib import Path

from mlx_finetune.engines import StepResult
from mlx_finetune.errors import UserError
from mlx_finetune.training.journal import HINT, NUMBER, Journal, Needed, Row, read_rows
from mlx_finetune.training.tracking import Tracker

NEEDED: Needed = {"step": int, "split": str, "loss": NUMBER}


class Metrics:
    """Appends to the file; a resumed run first drops what lies after its checkpoint."""

    def __init__(self, path: Path, start: int, trackers: Sequence[Tracker] = ()) -> None:
        """`start`: steps already done; later lines of an interrupted run are dropped, and `trackers` are told those before."""
        self._journal, self._trackers = Journal(path, start, NEEDED, "metrics"), trackers
        self.kept = self._journal.kept
        for row in self.kept:
            self._tell(row)

    def train(self, step: int, result: StepResult, rate: float, seconds: float, memory: int) -> None:
        """`step` counts from 1; loss in nats a token; seconds of this step; memory in bytes: the most held at once so far."""
        measured = {"loss": result.loss, "tokens": result.tokens, "grad_norm": result.grad_norm, "computed": result.computed}
        measured |= {"learning_rate": rate, "seconds": round(seconds, 3), "memory": memory}
        self._append({"step": step, "split": "train", **measured})

    def held_out(self, step: int, loss: float, by_source: dict[str, float]) -> None:
        """Mean nats a token over the validation tokens that count (see held_out.py), and by source; step 0 is the base model."""
        self._append({"step": step, "split": "valid", "loss": loss, "by_source": by_source})

    def _append(self, row: Row) -> None:
        self._journal.append(row)
        self._tell(row)

    def _tell(self, row: Row) -> None:
        for tracker in self._trackers:
            tracker.log(row)


class Unwritten:
    """In place of `Metrics` for a process that writes nothing."""

    kept: Sequence[Row] = ()

    def train(self, step: int, result: StepResult, rate: float, seconds: float, memory: int) -> None:
        """Of `Metrics`."""

    def held_out(self, step: int, loss: float, by_source: dict[str, float]) -> None:
        """Of `Metrics`."""


def read_metrics(path: Path) -> list[Row]:
    """All rows; a last line that a crash cut is left out. Rows of earlier versions have no `memory`."""
    if not path.is_file():
        raise UserError(f"{path}: no metrics", hint="mlx-finetune train writes them")
    rows = read_rows(path, NEEDED, "metrics")
    for number, row in enumerate(rows, 1):
        counted = row["split"] != "train" or isinstance(row.get("tokens"), int)
        sources = row.get("by_source", {})
        if not counted or not isinstance(sources, dict) or not all(isinstance(loss, NUMBER) for loss in sources.values()):
            raise UserError(f"{path}:{number}: not a line of metrics", hint=HINT)
    return rows
