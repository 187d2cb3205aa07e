"""metrics.jsonl: one line a training step, one a held-out loss."""

import json
from pathlib import Path
from typing import Any

from mlx_finetune.engines import StepResult
from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_file

HINT = "take the line out, or start a new run"


class Metrics:
    """Appends to the file; a resumed run first drops what lies after its checkpoint."""

    def __init__(self, path: Path, start: int) -> None:
        """`start`: steps already done; later lines of an interrupted run are dropped."""
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= start] if path.exists() and start else []
        with atomic_file(path) as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)

    def train(self, step: int, result: StepResult, rate: float, seconds: float) -> None:
        """`step` counts from 1; loss in nats a token; seconds of this step."""
        measured = {"loss": result.loss, "tokens": result.tokens, "grad_norm": result.grad_norm, "computed": result.computed}
        self._append({"step": step, "split": "train", **measured, "learning_rate": rate, "seconds": round(seconds, 3)})

    def held_out(self, step: int, loss: float, by_source: dict[str, float]) -> None:
        """Mean nats a token over the validation tokens that count (see held_out.py), and by source; step 0 is the base model."""
        self._append({"step": step, "split": "valid", "loss": loss, "by_source": by_source})

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class Unwritten:
    """In place of `Metrics` for a process that writes nothing."""

    def train(self, step: int, result: StepResult, rate: float, seconds: float) -> None:
        """Of `Metrics`."""

    def held_out(self, step: int, loss: float, by_source: dict[str, float]) -> None:
        """Of `Metrics`."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows; a last line that a crash cut is left out."""
    if not path.is_file():
        raise UserError(f"{path}: no metrics", hint="mlx-finetune train writes them")
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}:{number}: not JSON: {error.msg}", hint=HINT) from error
            continue
        if not isinstance(row, dict) or not {"step", "split", "loss"} <= row.keys():
            raise UserError(f"{path}:{number}: not a line of metrics", hint=HINT)
        rows.append(row)
    return rows
