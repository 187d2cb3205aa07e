"""benchmarks/parity.py, portability.py and processes.py at their smallest: what they measure is there and means what it says."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import parity
import parity_runs
import portability
import processes
import processes_runs
import tables
from tables import Table


def rows_of(found: list[Table], title: str) -> list[dict[str, Any]]:
    (table,) = (table for table in found if table.title == title)
    return list(table.rows)


def test_a_figure_over_its_bound_a_figure_that_is_none_and_a_broken_promise_are_named() -> None:
    rows = [{"what": "a", "off": 1e-6, "kept": True}, {"what": "b", "off": 2e-5, "kept": False}, {"what": "c", "off": math.nan}]
    table = Table("T", "why", [*rows, {"what": "d", "off": None}, {"what": "e"}], {"off": 1e-5}, ("kept",))
    assert [line.split(":")[1].strip() for line in table.broken()] == ["b", "b", "c", "d"]
    assert Table("T", "why", []).broken() == ["T: nothing was measured"]
    lines = table.lines()
    assert "| what | off (at most 1e-05) | kept |" in lines and "| b | 2.0e-05 | **no** |" in lines and "| e |  |  |" in lines


@pytest.mark.parametrize(("off", "status"), [(1e-6, 0), (1e-4, 1)])
def test_a_script_writes_both_files_and_its_status_says_whether_the_bounds_hold(
    off: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as ended:
        tables.run("x", "What it says.\n\n  x.py", lambda folder: [Table("T", "why", [{"what": "a", "off": off}], {"off": 1e-5})])
    found, text = json.loads((tmp_path / "new" / "x.json").read_text()), (tmp_path / "new" / "x.md").read_text()
    assert ended.value.code == status == len(found["broken"]) and found["tables"][0]["rows"] == [{"what": "a", "off": off}]
    assert text == capsys.readouterr().out[:-1] and text.startswith("# What it says\n") and found["versions"]["mlx"] in text
    assert ("Every bound holds" in text) is (status == 0)


@pytest.mark.long
def test_parity_finds_the_engines_alike_in_settings_schedules_and_an_architecture(tmp_path: Path) -> None:
    what = parity.What(("dora", "full"), (), ("qwen3",), ("wsd",), real_steps=0, promises=False, workers=1)
    found = parity.measure(tmp_path, what)
    assert [line for table in found for line in table.broken()] == []
    rows = rows_of(found, "Engine against engine")
    assert [row["setting"] for row in rows] == ["dora", "qwen3, lora", "qwen3, dora"]
    assert all(0 < row["loss"] < parity.LOSS and row["trained weight"] > 0 and row["weights trained"] > 10_000 for row in rows)
    assert [row["setting"] for row in rows_of(found, "Engine against engine, all weights trained with AdamW")] == ["full"]
    (wsd,) = rows_of(found, "Engine against engine, by schedule")
    assert wsd["rate in step 1"] == 2.5e-4 and wsd["rate in step 10"] == 1e-3 and wsd["rate in step 20"] == pytest.approx(1e-4)


def test_parity_tells_engines_that_differ_apart(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = parity_runs.twenty_steps
    other = {"mlx": 1e-3, "torch": 1.001e-3}
    monkeypatch.setattr(parity_runs, "twenty_steps", lambda e, model, how: own(e, model, how | {"learning_rate": other[e]}))
    row = parity_runs.engines_apart("x", tiny_llama, {})
    assert any(": loss is" in line for line in Table("T", "why", [row], parity.EVERY).broken())


def test_a_real_model_has_the_same_losses_in_either_log(tiny_llama: Path, tmp_path: Path) -> None:
    data = tables.sample_data(tiny_llama, tmp_path, valid_fraction=0.0, openassistant_valid_fraction=0.0)
    ours, theirs = (parity_runs.real_losses(tiny_llama, data, tmp_path / engine, engine, 2) for engine in tables.ENGINES)
    table = parity.real(ours, theirs)
    assert len(table.rows) == 2 and table.broken() == [] and 5 < ours[0] < 9
    assert len(parity.real(ours, [theirs[0], theirs[1] + 0.002]).broken()) == 1


@pytest.mark.long
def test_portability_moves_a_run_both_ways_and_starts_from_adapters_of_peft_and_mlx_lm(tmp_path: Path) -> None:
    found = portability.measure(tmp_path, portability.What(("rslora, wsd",), ("patterns",), ("dora",), workers=1))
    assert [line for table in found for line in table.broken()] == []
    moved = rows_of(found, "Moved to the other engine")
    assert [(row["from"], row["to"]) for row in moved] == [("mlx", "torch"), ("torch", "mlx")]
    assert all(row["training loss"] > 0 and row["held-out loss"] > 0 for row in moved)  # two engines did compute
    same = rows_of(found, "Resumed on the same engine")
    assert [row["losses bit-identical"] for row in same] == [row["all arrays bit-identical"] for row in same] == [True, True]
    started = rows_of(found, "Started from an adapter made elsewhere")
    assert [row["adapter"] for row in started] == ["peft, patterns", "mlx-lm, dora"] and "mlx-lm off by" in started[1]
    for row in started:
        assert abs(float(row["loss by peft"]) - float(row["without the adapter"])) > 1e-2


@pytest.mark.long
def test_two_processes_are_measured_against_one_and_what_they_sum_is_counted(tmp_path: Path) -> None:
    found = processes.measure(tmp_path, processes.What(processes_runs.KINDS[:1], kills=(), moves=False))
    assert [table.title for table in found] == ["Losses", "Summed in a step"]
    assert [line for table in found for line in table.broken()] == []
    (losses,), (sums,) = found[0].rows, found[1].rows
    assert 0 < losses["two against one"] < 1e-5
    assert sums["gradient, bytes"] == 4 * sums["trained numbers"] == 4 * 14848 and sums["loss, bytes"] == 8


@pytest.mark.long
def test_a_killed_process_is_seen_by_the_other_and_the_run_goes_on_in_one(tmp_path: Path) -> None:
    found = processes.measure(tmp_path, processes.What(processes_runs.KINDS[:1], kills=((1, False),), moves=False))
    (row,) = rows_of(found, "A process is killed")
    assert row["the other ended after, seconds"] < 30 and row["it says so"] and row["its launcher's"] == "1"
    assert row["the last step is saved"] and row["steps done"] >= 3 and row["resumed, loss off by"] < 1e-5


def test_the_last_line_and_the_statuses_are_read_from_what_launchers_say() -> None:
    said = "train 37 % step 3\nprocess 1: error: another process of this run is gone (x)\nhint: the last\nE1126 failed\n"
    assert processes_runs.last_line(said) == "process 1: error: another process of this run is gone (x)"
    assert processes_runs.last_line("[rank0]:   File x\n[rank0]: RuntimeError: closed\n") == "[rank0]: RuntimeError: closed"
    assert processes_runs.last_line("train 100 %\n") == ""
    torchrun = "  rank      : 1 (local_rank: 1)\n  exitcode  : -15 (pid: 1041)  (SIGTERM)\n"
    assert processes_runs.exits_in(torchrun) == {1: -15}
    assert processes_runs.exits_in("[WARN] Node with rank 0 exited with code 2 \n") == {0: 2}
