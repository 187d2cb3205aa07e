"""Weights & Biases: sends to its server, or with WANDB_MODE=offline writes beside the run."""

import os
from pathlib import Path
from typing import Any

from mlx_finetune.errors import UserError
from mlx_finetune.training.journal import Row
from mlx_finetune.training.tracking import PROJECT, identity, values_of


class WeightsAndBiases:
    """A run that goes on has the same id there; steps that the server has already are not told again.

    Of what wandb gathers by itself, nothing is asked for: no console, code, git, command line, host or list of packages.
    """

    def __init__(self, run: Path, settings: dict[str, Any]) -> None:
        """Raises UserError where nobody is logged in."""
        import wandb

        alone = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            host="local",  # else it looks up its name
            x_disable_meta=True,
            x_save_requirements=False,
        )
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run.resolve().name,
                id=identity(run),
                resume="allow",
                dir=str(run),
                config=settings,
                settings=alone,
            )
        except wandb.Error as error:
            hint = f"wandb login, or WANDB_MODE=offline; then mlx-finetune train --resume --out {run}"
            raise UserError(f"wandb: {' '.join(str(error).split())}", hint=hint) from error
        self._next = int(self._run.step)

    def log(self, row: Row) -> None:
        """See `Tracker.log`."""
        if row["step"] >= self._next:
            self._run.log(values_of(row), step=row["step"])

    def finish(self) -> None:
        """See `Tracker.finish`."""
        self._run.finish()


begin = WeightsAndBiases
