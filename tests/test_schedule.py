"""Rates by step, against what their definitions give by hand."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mlx_finetune.config import RunConfig, make_config
from mlx_finetune.training.schedule import learning_rate


def rates(steps: int = 100, learning_rate_: float = 0.5, **values: Any) -> list[float]:
    config: RunConfig = make_config({"learning_rate": learning_rate_, "warmup_ratio": 0.1} | values, "the test")
    return [learning_rate(step, steps, config) for step in range(steps)]


def test_the_warmup_rises_in_equal_parts_to_the_rate_of_the_config() -> None:
    for name in ("cosine", "linear", "constant", "wsd"):
        assert rates(lr_schedule=name)[:11] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.5])


def test_a_part_of_a_step_of_warmup_is_a_step_and_no_warmup_is_none() -> None:
    assert rates(10, lr_schedule="constant", warmup_ratio=0.11)[:3] == [0.25, 0.5, 0.5]
    assert rates(10, lr_schedule="constant", warmup_ratio=0.0) == [0.5] * 10


def test_the_cosine_begins_whole_is_half_in_the_middle_and_never_reaches_zero() -> None:
    falling = rates(lr_schedule="cosine")[10:]
    assert falling == pytest.approx([0.25 * (1 + np.cos(np.pi * i / 90)) for i in range(90)])
    assert falling[0] == 0.5 and falling[45] == pytest.approx(0.25) and 0 < falling[-1] < 1e-3


def test_the_line_falls_by_the_same_part_each_step_and_never_reaches_zero() -> None:
    falling = rates(lr_schedule="linear")[10:]
    assert falling == pytest.approx([0.5 * (90 - i) / 90 for i in range(90)])


def test_wsd_holds_and_falls_in_its_last_part_alone() -> None:
    held = rates(lr_schedule="wsd", decay_ratio=0.2)
    assert held[10:81] == [0.5] * 71 and held[80:] == pytest.approx([0.5 * (20 - i) / 20 for i in range(20)])
    assert rates(10, lr_schedule="wsd", warmup_ratio=0.0, decay_ratio=0.15)[7:] == pytest.approx([0.5, 0.5, 0.25])
    assert rates(lr_schedule="wsd", decay_ratio=0.0)[10:] == [0.5] * 90


def test_two_steps_and_one_are_runs_too() -> None:
    assert rates(2, lr_schedule="linear", warmup_ratio=0.5) == [0.5, 0.5]
    assert rates(1, lr_schedule="linear", warmup_ratio=0.0) == [0.5]
    assert rates(1, lr_schedule="wsd", warmup_ratio=0.9) == [0.5]


def test_the_rate_warms_up_and_falls_along_a_cosine() -> None:
    config = make_config({"learning_rate": 1.0, "warmup_ratio": 0.1}, "test")
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 0.001
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert learning_rate(0, 1, make_config({"warmup_ratio": 0.0}, "test")) == 2e-4
