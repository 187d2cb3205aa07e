"""Spikes of the loss and steps not applied: found in the rows alone, marked in each picture, told with their conversations."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Answer
from finished_runs import make_base, make_run
from reported_runs import long_metrics, name_model, write_metrics

from mlx_finetune.config import load_config
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.evaluation.plot import draw_loss
from mlx_finetune.evaluation.spikes import LEAST, marked_losses, not_applied, running_mean, spikes
from mlx_finetune.evaluation.terminal_plot import plot_rows
from mlx_finetune.report.curves import all_curves

CURVES = Path(__file__).with_name("loss_curves.json")  # of a tiny model on genuine gptme logs


def train_rows(losses: Any, tokens: Any = None) -> list[dict[str, Any]]:
    counts = [100] * len(losses) if tokens is None else tokens
    return [
        {"step": step, "split": "train", "loss": float(loss), "tokens": int(count)}
        for step, (loss, count) in enumerate(zip(losses, counts, strict=True), 1)
    ]


def skip(row: dict[str, Any], conversations: tuple[str, ...] = (), of: int = 4) -> None:
    """Makes it the row of a step that was not applied."""
    offending = [{"row": i, "conversation": name, "turns": [2], "gives": "loss"} for i, name in enumerate(conversations)]
    row |= {"loss": None, "grad_norm": None, "applied": False, "examples": of, "offending": offending}


def test_a_spike_is_told_from_noise() -> None:
    train = [row for row in long_metrics(300, (40, 143, 200)) if row["split"] == "train"]
    assert spikes(train) == [40, 143, 200] and spikes(train[:LEAST]) == []
    random = np.random.default_rng(1)
    assert spikes(train_rows(2 + 0.3 * random.normal(size=2000))) == []
    assert len(spikes(train_rows(random.gamma(4, 0.5, 2000), random.integers(20, 600, 2000)))) <= 1  # a long tail upwards
    assert spikes(train_rows([2.0] * 100)) == [] == spikes(train_rows([2.0] * 60 + [2.03] + [2.0] * 9))
    assert spikes(train_rows([2.0] * 60 + [2.1] + [2.0] * 9)) == [61]


@pytest.mark.parametrize("name", json.loads(CURVES.read_text()))
def test_genuine_curves_have_no_spike_and_each_that_is_planted_is_found(name: str) -> None:
    curve = json.loads(CURVES.read_text())[name]
    assert spikes(train_rows(curve["loss"], curve["tokens"])) == []
    widest = max(2.0, 12 * np.median(np.abs(np.diff(curve["loss"]))))  # nats; the curve itself falls by two
    for place in range(LEAST + 1, len(curve["loss"]), 37):
        losses = list(curve["loss"])
        losses[place] += widest
        assert spikes(train_rows(losses, curve["tokens"])) == [place + 1], place


def test_a_spike_is_judged_by_what_came_before_it_alone() -> None:
    losses = 2 + 0.3 * np.random.default_rng(3).normal(size=200)
    losses[90] += 4
    found = spikes(train_rows(losses))
    assert found == [91]
    for end in (91, 100, 150):  # a run that is still going has the marks that it will have
        assert spikes(train_rows(losses[:end])) == found
    assert spikes(train_rows(np.concatenate([losses, 9 + losses])))[:2] == [91, 201]  # one that never comes down again begins there
    far = np.concatenate([1000 * losses[:40], losses[40:]])  # more than a window ago, and forgotten by the running mean
    far[195] += 4
    assert 196 in spikes(train_rows(far))


def test_steps_that_were_not_applied_are_no_spikes_and_move_no_mean() -> None:
    rows = [row for row in long_metrics(120, (100,)) if row["split"] == "train"]
    with_them = [dict(row) for row in rows]
    for place in (0, 50, 119):
        with_them.insert(place, {**rows[place], "loss": 1e9 if place == 50 else float("nan"), "applied": False})
    assert spikes(with_them) == spikes(rows) == [100] and not_applied(with_them) == [1, 51, 120]
    heights = marked_losses(with_them)
    assert np.isfinite(list(heights.values())).all() and max(heights.values()) < 10
    drawn = {line.look: line for line in all_curves(with_them, [], 1.0)[0].lines}
    assert drawn["train"].values == running_mean(rows) and list(drawn["skipped"].steps) == [1, 51, 120]


def test_a_plot_of_characters_has_marks_below_and_says_what_they_are() -> None:
    rows = [row for row in long_metrics(300, (143,)) if row["split"] == "train"]
    for row in rows[219:221]:
        row |= {"loss": float("nan"), "applied": False}
    for plain in (False, True):
        lines = [line.plain for line in plot_rows(rows, [], 80, 14, plain)]
        axis = lines[-3]
        assert axis.count("x") == 1 and axis.count("v") in (1, 2) and max(map(len, lines)) <= 80 and len(lines) == 14
        start = axis.index("+" if plain else "\u2514") + 1
        assert abs((axis.index("x") - start) / (len(axis) - start - 1) - 142 / 299) < 0.02
        assert "x spike  v not applied" in lines[-2] and lines[-2].rstrip().endswith("step 300")
    assert "spike" not in "".join(line.plain for line in plot_rows(rows[:100], [], 80, 14))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its data, and metrics of 300 steps, of which one is a spike and three were not applied."""
    root = tmp_path_factory.mktemp("made")
    make_base(root)
    name_model(root)
    make_run(root, "torch")
    rows = long_metrics(300, (143,))
    steps = {row["step"]: row for row in rows if row["split"] == "train"}
    for step, names, of in ((90, ("c<b>1",), 4), (91, (), 4), (220, ("c2", "c3"), 2)):
        skip(steps[step], names, of)
    write_metrics(root / "run", rows)
    return root / "run"


def test_the_page_names_the_conversations_of_a_spike_and_those_that_kept_a_step_from_being_applied(run: Path, cli: Any) -> None:
    answer: Answer = cli("report", run)
    assert answer[0] == 0, answer[2]
    page = (run / "report.html").read_text(encoding="utf-8")
    told = unescape(re.sub(r"<[^>]*>", " ", page[page.index("<ul class=marked>") : page.index('id="learned"')]))
    config, dataset = load_config(run / "config.yaml", {}), Dataset.open(run.parent / "dataset")
    inside = {dataset.train[place].conversation for places in dataset.examples_at(142, config) for place in places}
    line = next(line for line in told.split("step ") if line.startswith("143"))
    assert inside and all(name in line for name in inside) and "loss " in line
    assert "90: conversation c<b>1, not finite alone" in told and "91: each of its examples is finite alone" in told
    assert "220: none of its examples is finite alone" in told and "c<b>1" not in page and "None" not in told


def test_the_pictures_mark_them_and_say_so(run: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    shown: list[list[str]] = []
    legend = Figure.legend
    monkeypatch.setattr(Figure, "legend", lambda self, *a, **k: shown.append([t.get_text() for t in legend(self, *a, **k).texts]))
    assert draw_loss(run) == run / "loss.png" and shown[0][-2:] == ["spike", "not applied"]
    status, out, _ = cli("plot", run, "--json")
    assert status == 0 and json.loads(out)["step"] == 300
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    skip(rows[-2] if rows[-2]["split"] == "train" else rows[-1])
    rows[-1] = rows[-1] | ({"loss": None} if rows[-1]["split"] == "valid" else {})
    write_metrics(run, rows)
    result = json.loads(cli("plot", run, "--json")[1])
    assert result["loss"] is None and result["held_out_loss"] is None
