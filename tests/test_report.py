"""A report says what the files of a run say: all of it, nothing else, and what is missing by its name."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import Answer
from finished_runs import make_base, make_run
from reported_runs import (
    HOSTILE,
    LOGGED,
    PLACEHOLDER,
    TUNED,
    evaluation,
    long_metrics,
    name_model,
    write_answers,
    write_evaluation,
    write_metrics,
)

from mlx_finetune.evaluation.terminal_plot import plot_rows
from mlx_finetune.report.curves import all_curves, thinned
from mlx_finetune.report.differences import WORDS, compared
from mlx_finetune.report.figures import figure
from mlx_finetune.report.files_of_run import Rate, Row
from mlx_finetune.report.html import percent
from mlx_finetune.report.results import verdict

Cli = Callable[..., Answer]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, dataset/, collected/ and a finished run/."""
    root = tmp_path_factory.mktemp("made")
    make_base(root)
    name_model(root)
    make_run(root, "torch")
    (root / "collected").mkdir()
    shutil.copy(root / "gptme.jsonl", root / "collected")
    told = {
        "found": {"gptme": 10},
        "conversations": {"gptme": 9},
        "rejected": {f"too short {HOSTILE}": 1},
        "assistant_turns": {"gptme": 9},
    }
    (root / "collected" / "collect.json").write_text(json.dumps(told), encoding="utf-8")
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A finished run to write into, with its data where it was."""
    shutil.copytree(made / "run", tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "samples.jsonl").unlink(missing_ok=True)  # written by hand where a test looks at it
    return tmp_path / "run"


def words_of(page: str) -> str:
    """What a person reads, without style and script."""
    page = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    words = " ".join(unescape(re.sub(r"<[^>]*>", " ", page)).split())
    return words.replace("\u2212", "-").replace("\u2013", "-")


def report(cli: Cli, run: Path, *more: str) -> str:
    """The page, which was made without a complaint."""
    status, out, err = cli("report", run, *more)
    assert status == 0 and "Traceback" not in err, err
    return Path(out.splitlines()[-1]).read_text(encoding="utf-8")


def test_the_headline_is_the_result_with_its_interval(run: Path, cli: Cli) -> None:
    write_evaluation(run)
    page = report(cli, run)
    words = words_of(page[: page.index("<main>")])
    assert "base tuned on 6 conversations" in words and "a LoRA adapter of rank 4" in words and "177 learned tokens" in words
    assert "3.500 base, then tuned: → 2.250 -1.250 (-1.375 to -1.125)" in words
    assert "12 % base, then tuned: → 50 % +38 (+25 to +50) points" in words
    assert "the true intervals are wider" not in words_of(page)
    assert "gptme-eval basic 0 base, then tuned: → 1 of 2" in words


def test_a_share_of_nearly_all_is_not_told_as_all_nor_one_of_nearly_none_as_none() -> None:
    shares = (None, 0.0, 0.004, 0.006, 0.5, 0.994, 0.9975, 1.0)
    assert [percent(share) for share in shares] == ["\u2013", "0 %", "under 1 %", "1 %", "50 %", "99 %", "over 99 %", "100 %"]


def test_every_group_and_rate_has_a_row_and_only_intervals_without_0_are_coloured(run: Path, cli: Cli) -> None:
    write_evaluation(run)
    page = report(cli, run)
    for row in evaluation("")["rows"][1:]:
        assert re.search(f"{row['base']:.3f} {row['tuned']:.3f} {row['difference']:+.3f}".replace("+", r"\+"), words_of(page))
    assert (
        verdict(Row(**evaluation("")["rows"][0]), False) == "better" and verdict(Row(**evaluation("")["rows"][4]), False) == "worse"
    )
    assert verdict(Row(**evaluation("")["rows"][2]), False) == "" == verdict(Row(**evaluation("")["rows"][5]), False)
    assert verdict(Rate(**evaluation("")["generation"]["rates"][0]), True) == "better"
    assert "patch applies" in words_of(page) and "- 100 % - 0 / 1" in words_of(page)


def test_what_is_not_there_is_said_with_what_to_do(run: Path, cli: Cli) -> None:
    page = words_of(report(cli, run))
    assert f"Not evaluated yet: mlx-finetune evaluate {run}" in page and "4 steps, finished" in page
    for title in ("Before and after", "Answers side by side", "While it learned"):
        assert title not in page
    for title in ("How it learned", "What it learns, token by token", "Data", "Settings and versions", "Use it"):
        assert title in page


def test_commands_are_told_as_a_shell_takes_them(run: Path, cli: Cli) -> None:
    moved = run.rename(run.parent / "my run's <b>")
    page = words_of(report(cli, moved))
    for verb in ("evaluate", "serve", "chat", "fuse", "export"):
        assert f"mlx-finetune {verb} {shlex.quote(str(moved))}" in page, verb


def test_an_evaluation_of_an_earlier_version_has_its_losses_by_source(run: Path, cli: Cli) -> None:
    kept = {
        name: value
        for name, value in evaluation("step-000004").items()
        if name in ("checkpoint", "step", "engine", "base", "tuned")
    }
    (run / "evaluation.json").write_text(json.dumps(kept), encoding="utf-8")
    page = words_of(report(cli, run))
    assert "3.500 base, then tuned: → 2.250 -1.250" in page and "gptme conversations source 3.500 2.250 -1.250" in page


def test_a_run_that_is_still_going_has_a_page(run: Path, cli: Cli) -> None:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20], encoding="utf-8")  # a line is being written
    page = words_of(report(cli, run))
    assert "step 2 of 4: still going, or stopped" in page and f"train --resume --out {run}" in page
    config = (run / "config.yaml").read_text(encoding="utf-8").replace("patience: 0", "patience: 1")
    (run / "config.yaml").write_text(config, encoding="utf-8")
    rows = [{"step": step, "split": "valid", "loss": loss} for step, loss in ((1, 2.0), (2, 2.5))]
    write_metrics(run, [*rows, {"step": 2, "split": "train", "loss": 2.0, "tokens": 5}])
    page = words_of(report(cli, run))
    assert "stopped early at step 2 of 4: the held-out loss was measured once since its lowest, 2.0000 at step 1" in page
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "checkpoints")
    page = words_of(report(cli, run))
    assert "step 0 of 4" in page and "Nothing is measured yet" in page and "No checkpoint is saved yet" in page


def test_what_the_data_was_made_of_is_shown_only_where_it_is_still_that(run: Path, made: Path, cli: Cli, tmp_path: Path) -> None:
    page = words_of(report(cli, run))
    assert (
        "gptme 10 9 1 9" in page
        and "too short" in page
        and "turns after exactly the tokens that are served 6 (100 %) 3 (100 %)" in page
    )
    root = tmp_path / "elsewhere"
    shutil.copytree(made, root, symlinks=True)
    config = (root / "run" / "config.yaml").read_text(encoding="utf-8").replace(str(made), str(root))
    (root / "run" / "config.yaml").write_text(config, encoding="utf-8")
    with (root / "collected" / "gptme.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")
    page = words_of(report(cli, root / "run"))
    assert "gptme 10 9 1 9" not in page and "What collect found and rejected is not here" in page
    info = json.loads((root / "dataset" / "dataset.json").read_text(encoding="utf-8")) | {"model": str(root / "moved")}
    (root / "dataset" / "dataset.json").write_text(json.dumps(info), encoding="utf-8")
    page = words_of(report(cli, root / "run"))
    assert "prepared for a model that is not there" in page and "turns after exactly the tokens that are served" in page
    (root / "dataset" / "dataset.json").write_text(json.dumps(info | {"id": "0" * 16}), encoding="utf-8")
    page = words_of(report(cli, root / "run"))
    assert page.count("prepared anew since this run learned from it") == 2 and "tuned a LoRA" in page
    shutil.rmtree(root / "dataset")
    assert words_of(report(cli, root / "run")).count("not a prepared data set") == 2


def test_answers_stand_beside_the_log_with_what_differs_and_how_they_were_judged(run: Path, cli: Cli) -> None:
    write_evaluation(run)
    write_answers(run)
    page = report(cli, run)
    samples = page[page.index('id="samples"') : page.index('id="while"')]
    assert (
        samples.count("<article") == 6
        and "2 more" in samples
        and "<del> first</del>" in samples
        and "<del> --short</del>" in samples
    )
    assert "<ins>" not in samples.replace("<ins>what it does not have</ins>", "")  # the base has too little in common to be marked
    assert samples.count("<li class=yes>") == 6 == samples.count("<li class=no>")
    learned = page[page.index('id="while"') : page.index('id="learned"')]
    assert learned.count("<article") == 2 and "no longer so" not in learned  # answered again after it was resumed
    assert "alike with the log: 0 % \u2192 23 % \u2192 82 %" in learned


def test_three_examples_show_what_is_learned_token_by_token(run: Path, made: Path, cli: Cli) -> None:
    page = report(cli, run)
    page = page[page.index('id="learned"') : page.index('id="data"')]
    shown = page.split("<article")[1:]
    assert [re.findall(r"example \d+", each)[0] for each in shown] == ["example 0", "example 2", "example 5"]
    rows = [json.loads(line) for line in (made / "dataset" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    for number, each in zip((0, 2, 5), shown, strict=True):
        learned = unescape(re.sub(r"<[^>]*>", "", "".join(re.findall(r"<mark>.*?</mark>", each, re.DOTALL))))
        assert learned == rows[number]["messages"][-1]["content"] + "<|im_end|>"


def test_nothing_of_a_conversation_is_more_than_text_and_placeholders_stay(run: Path, cli: Cli) -> None:
    write_evaluation(run, note=HOSTILE)
    write_answers(run)
    page = report(cli, run)
    assert page.count("<script>") == 1 and "<img" not in page and "<b>bold" not in page and "\u202e" not in page
    assert unescape(page).count("<script>document.title = 'owned'</script>") > 15 and PLACEHOLDER in page


def test_a_page_needs_nothing_but_itself(run: Path, cli: Cli) -> None:
    write_evaluation(run)
    write_metrics(run, long_metrics())
    page = report(cli, run).replace("&lt;img src=x", "")
    assert set(re.findall(r"""(?:src|href)\s*=\s*["']?(.)""", page)) == {"#"} and set(re.findall(r"url\((.)", page)) == {"#"}
    assert "@import" not in page and "default-src 'none'" in page and " style=" not in page
    urls = re.findall(r"https?://[^\s<\"]*", page)
    assert set(urls) == {"http://127.0.0.1:8080/v1"}  # the address of the server, in a command
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'[("]#([\w-]+)', page)) <= set(ids)


def test_every_figure_has_axes_units_and_a_legend_where_there_are_several_curves() -> None:
    rows = long_metrics()
    curves = all_curves([row for row in rows if row["split"] == "train"], [row for row in rows if row["split"] == "valid"], 1.0)
    assert [one.name for one in curves] == ["loss", "sources", "rate", "norm", "speed", "memory"]
    for one in curves:
        for svg in re.findall(r"<svg.*?</svg>", figure(one), re.DOTALL):
            root = ElementTree.fromstring(svg)
            texts = [text.text for text in root.iter("text")]
            assert root.get("role") == "img" and not {"width", "height"} & set(root.keys()) and root.get("viewBox")
            title, told = root.find("title"), root.find("desc")
            assert title is not None and told is not None and root.get("aria-labelledby") == title.get("id")
            assert told.text and root.get("aria-describedby") == told.get("id")
            assert "step" in texts and one.unit in texts and re.search(r"\(.+\)", one.unit)
            drawn = [group for group in root.iter("g") if "curve" in group.get("class", "")]
            assert len(drawn) == len(one.lines)
            legends = [group for group in root.iter("g") if "legend" in group.get("class", "")]
            named = [text.text for text in legends[0].iter("text")] if legends else []
            assert named == ([line.label for line in one.lines] if len(one.lines) > 1 else [])
            assert not [e for e in root.iter() if re.search(r"#[0-9a-f]{6}", " ".join((e.get("fill", ""), e.get("stroke", ""))))]


def test_what_was_not_measured_has_no_figure(run: Path, cli: Cli) -> None:
    page = report(cli, run)  # of a version that did not measure memory, or of an engine that cannot
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert ('id="figure-memory"' in page) == any("memory" in row for row in rows)
    write_metrics(run, [{"step": 1, "split": "train", "loss": 2.0, "tokens": 5}])
    assert re.findall(r'id="figure-(\w+)"', report(cli, run)) == ["loss"]


def test_a_long_curve_is_thinned_without_losing_its_highest_and_lowest() -> None:
    values = list(np.random.default_rng(0).normal(size=20_000))
    steps, kept = thinned(list(range(20_000)), values, 500)
    assert len(kept) <= 502 and max(kept) == max(values) and min(kept) == min(values) and steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 19_999) and all(values[step] == value for step, value in zip(steps, kept, strict=True))


def test_a_marked_answer_holds_the_log_and_the_answer() -> None:
    random = np.random.default_rng(2)
    pieces = ["a", "b ", "\n", "```", "<x>", "&", "好", "  "]
    for _ in range(200):
        logged, answer = ("".join(random.choice(pieces, random.integers(0, 30))) for _ in range(2))
        found = compared(logged, answer)
        told = found.html
        assert unescape(re.sub(r"<del>.*?</del>|</?ins>", "", told, flags=re.DOTALL)) == answer.strip()
        if "<del>" in told or "<ins>" in told:
            assert unescape(re.sub(r"<ins>.*?</ins>|</?del>", "", told, flags=re.DOTALL)) == logged.strip()
        assert 0 <= found.alike <= 1 and (found.alike == 1) == (logged.strip() == answer.strip() != "")
    assert compared(LOGGED, TUNED).alike > 0.7 and "".join(WORDS.findall(LOGGED)) == LOGGED


def test_long_answers_are_compared_by_line_and_soon() -> None:
    logged = "\n".join(f"line {i} of a long file" for i in range(3000))
    found = compared(logged, logged.replace("line 7 of", "row 7 of"))
    assert "<del>line 7 of a long file\n</del><ins>row 7 of a long file\n</ins>" in found.html and found.alike > 0.99


def test_the_own_page_is_made_anew_and_nothing_else_is_overwritten(run: Path, cli: Cli, tmp_path: Path) -> None:
    report(cli, run)
    (run / "report.html").write_text("old", encoding="utf-8")
    assert report(cli, run) != "old" and report(cli, run, "--out", str(run / "report.html")) != "old"
    report(cli, run, "--out", str(tmp_path / "a.html"))
    status, out, err = cli("report", run, "--out", tmp_path / "a.html")
    assert (status, out) == (2, "") and "a.html exists already" in err and err.count("\n") == 2


DAMAGED = {
    "cut off": ("evaluation.json", '{"checkpoint": "step', "not JSON"),
    "a list": ("evaluation.json", "[]", "evaluation.json: all of it"),
    "a loss in words": ("evaluation.json", json.dumps(evaluation("a") | {"base": {"loss": "low", "by_source": {}}}), "base.loss"),
    "rows of nothing": ("evaluation.json", json.dumps(evaluation("a") | {"rows": [{}]}), "rows.0.group"),
    "an answer without a step": ("samples.jsonl", '{"prompt": 1}\n{"step": 1}\n\n', "samples.jsonl:1"),
    "no metrics": ("metrics.jsonl", '{"step": 1, "split": "train", "loss": "x", "tokens": 1}\n', "metrics.jsonl:1"),
    "a step of no tokens": ("metrics.jsonl", '{"step": 1, "split": "train", "loss": 1.5, "tokens": 0}\n', "metrics.jsonl:1"),
    "sources of no loss": ("metrics.jsonl", '{"step": 1, "split": "valid", "loss": 1, "by_source": []}\n', "metrics.jsonl:1"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line_and_a_hint_and_the_old_page_stays(name: str, run: Path, cli: Cli) -> None:
    file, text, message = DAMAGED[name]
    (run / "report.html").write_text("old", encoding="utf-8")
    (run / file).write_text(text, encoding="utf-8")
    status, out, err = cli("report", run)
    announced, error, hint = err.splitlines()
    assert (status, out) == (2, "") and announced.startswith("report of ") and message in error and hint.startswith("hint: ")
    assert (run / "report.html").read_text(encoding="utf-8") == "old"


def test_a_line_that_is_cut_within_a_character_is_still_being_written(run: Path, cli: Cli) -> None:
    write_answers(run)
    line = json.dumps({"step": 4, "prompt": 7, "question": "q", "logged": "l", "answer": "\u597d"}, ensure_ascii=False).encode()
    cut = line[: line.index(b"\xe5") + 1]
    whole = (run / "samples.jsonl").read_bytes()
    (run / "samples.jsonl").write_bytes(whole + cut)
    assert "Prompt 2" in words_of(report(cli, run)) and "Prompt 8" not in words_of(report(cli, run))
    (run / "samples.jsonl").write_bytes(cut + b"\n" + whole)
    status, out, err = cli("report", run)
    assert (status, out) == (2, "") and "samples.jsonl:1: not JSON" in err and err.count("\n") == 3


def test_what_is_no_run_is_refused(cli: Cli, tmp_path: Path) -> None:
    for verb, message in (("report", "not a run"), ("plot", "no losses yet")):
        status, out, err = cli(verb, tmp_path)
        assert (status, out) == (2, "") and message in err.splitlines()[-2] and err.splitlines()[-1].startswith("hint: ")


def test_without_matplotlib_plot_still_plots_and_report_says_what_to_install(
    run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = cli("plot", run)
    assert status == 0 and "held out" in out and "step 4" in out and "pip install matplotlib" in err and "loss.png" not in out
    assert json.loads(cli("plot", run, "--json")[1])["picture"] is None
    status, out, err = cli("report", run)
    assert (status, out) == (2, "") and "pip install matplotlib" in err and err.count("\n") == 2


def test_plot_draws_in_the_terminal_and_a_picture(run: Path, cli: Cli) -> None:
    status, out, _ = cli("plot", run)
    lines = out.splitlines()
    assert (
        status == 0
        and lines[-1] == str(run / "loss.png")
        and "nats a learned token" in lines[0]
        and lines[-3].endswith("step 4")
        and "held out" in lines[-2]
    )
    assert (
        "\x1b" not in out and any("\u2801" <= sign <= "\u28ff" for sign in out) and out.count("\u25cf") == 4
    )  # three, and one in the key
    assert json.loads(cli("plot", run, "--json")[1])["step"] == 4


@pytest.mark.parametrize("plain", [False, True])
def test_a_plot_of_characters_fits_its_place_and_shows_the_extremes(plain: bool) -> None:
    rows = [*long_metrics(), {"step": 301, "split": "train", "loss": float("nan"), "tokens": 1}]
    train, valid = [row for row in rows if row["split"] == "train"], [row for row in rows if row["split"] == "valid"]
    for width, height in ((44, 10), (100, 20), (200, 50)):
        lines = [line.plain for line in plot_rows(train, valid, width, height, plain)]
        assert max(map(len, lines)) <= width and len(lines) == height and (not plain or "".join(lines).isascii())
        assert lines[-2].split() == ["0", "x", "spike", "step", "300"] and lines[1].strip() and lines[-4].strip()
    only = [line.plain for line in plot_rows(train[:1], [], 40, 10, plain)]
    assert len(only) == 10 and plot_rows([], [], 40, 10) == []
