"""Trackio: a data base on this machine, unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL name another place."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from mlx_finetune.training.journal import Row
from mlx_finetune.training.tracking import PROJECT, identity, values_of


class Trackio:
    """A run that goes on goes on there too; steps that it has already are not told again."""

    def __init__(self, run: Path, settings: dict[str, Any]) -> None:
        """What trackio prints goes to stderr."""
        import trackio

        name = f"{run.resolve().name}-{identity(run)}"
        with redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=PROJECT, name=name, config=settings, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
            )
        self._next = int(self._run._next_step)  # 0 of a new run

    def log(self, row: Row) -> None:
        """See `Tracker.log`."""
        if row["step"] >= self._next:
            self._run.log(values_of(row), step=row["step"])

    def finish(self) -> None:
        """See `Tracker.finish`."""
        import trackio

        with redirect_stdout(sys.stderr):
            trackio.finish()


begin = Trackio
