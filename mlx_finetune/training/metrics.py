"""metrics.jsonl: one line a training step, one a held-out loss. Trackers are told the same rows.

A loss or a gradient that is no finite number is null in the file and NaN to those who read it. The row of a training step that was
not applied says `"applied": false`, of how many examples it was, and which of them offend.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_finetune.engines import StepResult
from mlx_finetune.errors import UserError
from mlx_finetune.training.journal import HINT, NUMBER, Journal, Needed, Row, read_rows
from mlx_finetune.training.offenders import Offending
from mlx_finetune.training.tracking import Tracker

NEEDED: Needed = {"step": int, "split": str, "loss": (*NUMBER, type(None))}
MEASURED = ("computed", "learning_rate", "seconds", "memory")  # of a training step, beside its loss, gradient and tokens


class Metrics:
    """Appends to the file; a resumed run first drops what lies after its checkpoint."""

    def __init__(self, path: Path, start: int, trackers: Sequence[Tracker] = ()) -> None:
        """`start`: steps already done; later lines of an interrupted run are dropped, and `trackers` are told those before."""
        self._journal, self._trackers = Journal(path, start, NEEDED, "metrics"), trackers
        self.kept = [_read(row) for row in self._journal.kept]
        for row in self._journal.kept:
            self._tell(row)

    def train(
        self, step: int, result: StepResult, rate: float, seconds: float, memory: int, offending: Offending | None = None
    ) -> None:
        """`step` counts from 1; loss in nats a token; seconds of this step; memory in bytes: the most held at once so far.

        offending: of a step that was not applied.
        """
        measured = {"loss": result.loss, "tokens": result.tokens, "grad_norm": result.grad_norm, "computed": result.computed}
        measured |= {"learning_rate": rate, "seconds": round(seconds, 3), "memory": memory}
        why = {"applied": False, **offending.to_json()} if offending else {}
        self._append({"step": step, "split": "train", **measured, **why})

    def held_out(self, step: int, loss: float, by_source: dict[str, float], offending: Offending | None = None) -> None:
        """Mean nats a token over the validation tokens that count (see held_out.py), and by source; step 0 is the base model.

        offending: where a loss is not finite.
        """
        why = offending.to_json() if offending else {}
        self._append({"step": step, "split": "valid", "loss": loss, "by_source": by_source, **why})

    def _append(self, row: Row) -> None:
        row = {name: _written(value) for name, value in row.items()}
        self._journal.append(row)
        self._tell(row)

    def _tell(self, row: Row) -> None:
        for tracker in self._trackers:
            tracker.log(row)


class Unwritten:
    """In place of `Metrics` for a process that writes nothing."""

    kept: Sequence[Row] = ()

    def train(
        self, step: int, result: StepResult, rate: float, seconds: float, memory: int, offending: Offending | None = None
    ) -> None:
        """Of `Metrics`."""

    def held_out(self, step: int, loss: float, by_source: dict[str, float], offending: Offending | None = None) -> None:
        """Of `Metrics`."""


def read_metrics(path: Path) -> list[Row]:
    """All rows; a last line that a crash cut is left out. Rows of earlier versions have no `memory`.

    Raises:
        UserError: no such file, or a line has not what such a line has.
    """
    if not path.is_file():
        raise UserError(f"{path}: no metrics", hint="mlx-finetune train writes them")
    rows = read_rows(path, NEEDED, "metrics")
    for number, row in enumerate(rows, 1):
        if not (_is_of_training(row) if row["split"] == "train" else _is_held_out(row)):
            raise UserError(f"{path}:{number}: not a line of metrics", hint=HINT)
    return [_read(row) for row in rows]


def applied(row: Mapping[str, Any]) -> bool:
    """Whether the step of a row of training changed anything."""
    return bool(row.get("applied", True))


def not_applied_in_a_row(rows: Sequence[Row]) -> int:
    """How many steps of training at the end of `rows` were not applied."""
    count = 0
    for row in reversed([row for row in rows if row["split"] == "train"]):
        if applied(row):
            break
        count += 1
    return count


def _is_of_training(row: Row) -> bool:
    offending = row.get("offending", [])
    finite = not applied(row) or (_is_number(row["loss"]) and _is_number(row.get("grad_norm", 0)))
    named = isinstance(offending, list) and all(
        isinstance(one, dict) and isinstance(one.get("conversation"), str) and isinstance(one.get("row"), int) for one in offending
    )
    return (
        _is_count(row["step"])
        and _is_count(row.get("tokens"))
        and row["tokens"] > 0
        and finite
        and named
        and isinstance(row.get("applied", True), bool)
        and all(_is_number(row[name]) for name in MEASURED if name in row)
    )


def _is_held_out(row: Row) -> bool:
    sources = row.get("by_source", {})
    return (
        _is_count(row["step"])
        and isinstance(sources, dict)
        and all(loss is None or _is_number(loss) for loss in (row["loss"], *sources.values()))
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _written(value: Any) -> Any:
    """JSON knows no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {name: _written(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(row: Row) -> Row:
    """What was not finite as NaN; earlier versions wrote it as it was."""
    numbers = {name: _or_nan(row[name]) for name in ("loss", "grad_norm") if name in row}
    sources = {"by_source": {n: _or_nan(v) for n, v in row["by_source"].items()}} if isinstance(row.get("by_source"), dict) else {}
    return row | numbers | sources


def _or_nan(value: Any) -> Any:
    return math.nan if value is None or (isinstance(value, float) and not math.isfinite(value)) else value
