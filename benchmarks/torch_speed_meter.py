"""What a side of torch_speed.py is measured with, and what all sides are given alike."""

import sys
import time
from math import prod
from pathlib import Path
from typing import Any

import psutil
from train_speed_steps import Figures

from mlx_finetune.engines import process_peak
from mlx_finetune.models.weights import tensor_headers

RATE = 1e-4
SIZES = {"float32": 4, "bfloat16": 2}
Job = dict[str, Any]  # side, model, data, in_order, repeat, batch, accumulation, checkpoint, threads, dtype, options


class Meter:
    """Clock after each optimizer step, and the most memory beside weights and what the process held before it loaded them."""

    def __init__(self, job: Job) -> None:
        """On a CPU, memory is what is resident: VmHWM on Linux, for it can be lowered, and ru_maxrss begins at the parent's."""
        import torch

        self.torch, self.cuda, self.model = torch, torch.cuda.is_available(), job["model"]
        torch.set_num_threads(job["threads"])
        if self.cuda:
            torch.cuda.init()
        self.weights = SIZES[job["dtype"]] * sum(prod(one.shape) for one in tensor_headers(Path(self.model)).values())
        self.before = self.at_load = 0
        self.marks: list[tuple[float, float]] = []

    def loading(self) -> None:
        """All is imported and the data is open; what loading a model imports is no memory of a step either."""
        from transformers import AutoConfig, AutoModelForCausalLM

        with self.torch.device("meta"):
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.model))
        self.before = self._held()

    def loaded(self) -> None:
        """Forgets what loading took for a moment. Weights may lie in a file yet that is mapped, and come in as they are read."""
        self.at_load = self._held() - self.before
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM

    def mark(self) -> None:
        """A step is done."""
        if self.cuda:
            self.torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time()))

    def figures(self) -> Figures:
        """From the first mark, the end of the warm-up, to the last."""
        (began, cpu_began), (ended, cpu_ended) = self.marks[0], self.marks[-1]
        figures: Figures = {"seconds": ended - began, "cpu": cpu_ended - cpu_began, "steps": len(self.marks) - 1}
        figures |= {"peak": float(self._peak() - self.before - self.weights), "loaded": self.at_load, "weights": self.weights}
        figures |= {"threads": self.torch.get_num_threads()}
        return figures | {"device": self.torch.cuda.get_device_name() if self.cuda else "cpu"}

    def _held(self) -> int:
        return int(self.torch.cuda.memory_allocated() if self.cuda else psutil.Process().memory_info().rss)

    def _peak(self) -> int:
        if self.cuda:
            return int(self.torch.cuda.max_memory_allocated())
        if sys.platform != "linux":
            return process_peak()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
