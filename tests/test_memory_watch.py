"""Memory that gets short is seen, also in the midst of a step, and no memory is one line."""

import threading
import time
from typing import Any

import numpy as np
import psutil
import pytest

from mlx_finetune.config import make_config
from mlx_finetune.errors import UserError
from mlx_finetune.training.memory_watch import MemoryWatch, memory_errors, watched


def test_what_was_swapped_before_the_run_does_not_count_and_what_is_swapped_in_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, swap, memory = MemoryWatch(), psutil.swap_memory(), psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=memory.total))
    watch.shortage()
    assert watch.shortage() is None
    monkeypatch.setattr(psutil, "swap_memory", lambda: swap._replace(used=swap.used + 2 * 2**30))
    assert watch.shortage() == "2.0 GB were swapped to the disk since the start"
    assert MemoryWatch().shortage() is None


def test_memory_that_was_short_in_the_midst_of_a_step_is_seen_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, asked = psutil.virtual_memory(), threading.Event()

    def falling() -> Any:
        if threading.current_thread() is threading.main_thread():
            return memory._replace(available=memory.total)
        asked.set()
        return memory._replace(available=2**20)

    monkeypatch.setattr(psutil, "virtual_memory", falling)
    with watched() as watch:
        assert asked.wait(10)
        time.sleep(0.05)
        assert (watch.shortage() or "").startswith("0.0 of")
    assert "memory" not in {thread.name for thread in threading.enumerate()}


def test_no_memory_is_one_line_that_says_how_to_go_on_and_other_errors_pass() -> None:
    import torch

    def of_torch() -> None:
        torch.empty(2**55)

    def of_numpy() -> None:
        np.empty(2**55)

    for values, hint in (({}, "--set grad_checkpoint=1"), ({"grad_checkpoint": 1}, "close other programs")):
        for fails in (of_torch, of_numpy):
            with pytest.raises(UserError, match="step 3: no memory left") as error, memory_errors(3, make_config(values, "test")):
                fails()
            assert hint in error.value.hint and "\n" not in error.value.message
    with pytest.raises(RuntimeError, match="other"), memory_errors(3, make_config({}, "test")):
        raise RuntimeError("some other thing")
