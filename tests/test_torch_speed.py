"""benchmarks/torch_speed.py on a tiny model: all sides learn the same tokens with the same losses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytest import approx

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import torch_speed_data as data
from torch_speed_peers import WarmFirst
from torch_speed_report import beside, goals, loss_difference
from torch_speed_steps import measure

from mlx_finetune.data.dataset import Dataset
from mlx_finetune.planning.model_shape import model_shape

SAME = 1e-5  # as a share of a loss; a vocabulary of 320 is summed more exactly than one of 49,152
SIDES = ("ours", "trl", "hf")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> data.Data:
    return data.Data(tmp_path_factory.mktemp("torch_speed"), tiny_llama, 64)


def job(side: str, model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    shape = {"in_order": False, "repeat": 1, "batch": 4, "accumulation": 2, "checkpoint": False, "threads": 2}
    return {"side": side, "model": str(model), "data": str(folder), "dtype": "float32", "options": {}} | shape | changes


@pytest.mark.long
def test_the_script_finds_that_all_sides_learn_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(Path(data.__file__).with_name("torch_speed.py")),
        "--model",
        str(tiny_llama),
        "--out",
        str(tmp_path),
    ]
    command += "--lengths 64 --mix-length 128 --batches 1x4 --checkpointing no --only rows --rounds 1 --threads 2".split()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "torch_speed.json").read_text(encoding="utf-8"))
    [cell] = found["cells"]
    assert {side: one["learned"] for side, one in cell["sides"].items()} == dict.fromkeys(SIDES, 64)
    assert cell["loss_difference"] < SAME and found["unequal"] == []
    assert all(one["peak"] > 0 and len(one["losses"]) == 2 for one in cell["sides"].values())
    assert (tmp_path / "torch_speed.md").read_text(encoding="utf-8") == done.stdout[:-1]


@pytest.mark.parametrize("checkpoint", [False, True])
def test_all_learn_the_mix_whole_whatever_order_and_padding_they_choose(
    tiny_llama: Path, made: data.Data, checkpoint: bool
) -> None:
    folder = made.mix(128, 12, step=8)
    found = [measure(job(side, tiny_llama, folder, checkpoint=checkpoint)) for side in SIDES]
    examples = list(Dataset.open(folder).train)
    assert [one["learned"] for one in found] == [sum(int((e.weights > 0).sum()) for e in examples)] * 3
    assert all(one["computed"] >= sum(len(e.tokens) for e in examples) for one in found[1:])
    assert [one["steps"] for one in found] == [2, 2, 2]
    assert loss_difference(found, every_step=False) < SAME
    assert len({one["adapted"] for one in found}) == 1


def test_rows_of_a_batch_have_the_same_losses_step_by_step(tiny_llama: Path, made: data.Data) -> None:
    folder = made.rows(96, 4, mixed=128)
    shape = {"in_order": True, "repeat": 3, "batch": 4, "accumulation": 1}
    found = [measure(job(side, tiny_llama, folder, **shape)) for side in SIDES]
    assert all(len(one["losses"]) == 4 and one["losses"][-1] < one["losses"][1] for one in found)
    assert loss_difference(found, every_step=True) < SAME


def test_a_row_is_full_and_learned_in_turns() -> None:
    rows = data.rows_of(np.arange(1000, dtype=np.int32), 100, 3)
    assert [(row.tokens[0], row.tokens[-1]) for row in rows] == [(0, 99), (100, 199), (200, 299)]
    weights = rows[0].weights
    assert weights.mean() == approx(data.SHARE, abs=0.03) and weights[-1] == 1
    assert np.count_nonzero(np.diff(weights) > 0) == data.TURNS


def test_the_warm_up_comes_first_and_each_example_once() -> None:
    assert list(WarmFirst([3, 0, 4, 1, 2], first=2)) == [0, 1, 3, 4, 2]


@pytest.mark.long
def test_a_random_model_has_the_size_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 8, "intermediate_size": 96}
    monkeypatch.setitem(data.RANDOM, "1b", data.LLAMA | small)
    shape = model_shape(str(data.make_random("1b", tmp_path)))
    assert shape.dtype == "BF16" and shape.sizes.layers == 2 and shape.sizes.vocabulary == 128256
    assert data.ChatTemplate.load(tmp_path / "random-1b").prompt_tokens("hello")


def test_goals_are_counted_beside_each_peer() -> None:
    ours = {"learned_a_second": 20.0, "learned": 20, "cpu": 1.0, "peak": 6.0}
    table = [{"beside": {"hf": beside(ours, ours | {"learned_a_second": rate, "peak": 10.0})}} for rate in (10.0, 19.0)]
    found = goals(table)["hf"]
    assert (found["speed"]["reached"], found["memory"]["reached"], found["settings"]) == (1, 2, 2)
    assert found["speed"]["worst"] == approx(20 / 19)
