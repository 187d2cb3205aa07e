"""The processes of train_speed.py that measure, one for each side, model and checkpointing."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from train_speed_report import Figures, Key

LAYERS, CUT_LAYERS = 16, 4  # adapted layers of the whole model; layers of the cut one, all of them adapted
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Sides:
    """The processes that measure: one for each side and model and checkpointing, only those of one model at a time."""

    def __init__(self, models: dict[bool, Path], options: dict[str, Any], memory: int) -> None:
        self.models, self.options, self.memory = models, options, memory
        self.running: dict[tuple[str, bool, bool], subprocess.Popen[str]] = {}

    def __enter__(self) -> "Sides":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end(list(self.running))

    def do(self, key: Key, job: dict[str, Any]) -> Figures | None:
        """None: a signal ended the process in the midst of it; MLX and BLAS die of it where they get no memory."""
        which = key[:3]
        self._end([one for one in self.running if one[1] != which[1]])
        if which not in self.running:
            self.running[which] = self._start(*which)
        process = self.running[which]
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        if line := process.stdout.readline():
            return dict(json.loads(line))
        if (code := self.running.pop(which).wait()) >= 0:
            raise SystemExit(f"{key}: exit status {code}; what went wrong stands above")
        return None

    def _start(self, side: str, cut: bool, checkpoint: bool) -> subprocess.Popen[str]:
        start = {"side": side, "model": str(self.models[cut]), "layers": CUT_LAYERS if cut else LAYERS, "checkpoint": checkpoint}
        start |= {"options": self.options, "memory": self.memory}
        script = Path(__file__).with_name("train_speed_steps.py")
        command = [sys.executable, str(script), json.dumps(start)]
        pipe, environment = subprocess.PIPE, os.environ | ONE_THREAD
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def _end(self, which: Sequence[tuple[str, bool, bool]]) -> None:
        for one in which:
            process = self.running.pop(one)
            assert process.stdin
            process.stdin.close()
            process.wait()
