"""The card: front matter that the Hub reads, true numbers, and nothing of a person."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from finished_runs import WORDS, make_base, make_run

from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.compare import compare, open_run
from mlx_finetune.evaluation.wanted import Wanted
from mlx_finetune.export.card import card, split_card
from mlx_finetune.export.facts import Facts, HeldOut, base_name, read_facts
from mlx_finetune.export.report import RAN
from mlx_finetune.installed import versions
from mlx_finetune.training.metrics import read_metrics

REPORT = {
    "verified": {"backend": "transformers", "largest_difference": 1.25e-5, "engine": {"name": "mlx"}, "missing": []},
    "versions": versions(RAN),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never written to, but for what evaluate leaves."""
    root = tmp_path_factory.mktemp("card")
    make_base(root)
    return make_run(root, "mlx", target_modules=("q_proj", "v_proj"))


@pytest.fixture
def facts(run: Path) -> Facts:
    config, model, checkpoint = open_run(run, "step-000004")
    return read_facts(run, checkpoint, model, config)


def rows(text: str) -> dict[str, list[str]]:
    """The lines of the tables by their first cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


def test_the_front_matter_is_what_the_hub_reads(facts):
    settings, _ = split_card(card(replace(facts, base="org/base", on_hub=True), REPORT))
    assert settings == {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": ["en"],
        "tags": ["mlx-finetune", "gptme", "lora"],
    }
    adapter, _ = split_card(card(replace(facts, base="org/base", on_hub=True), REPORT, "adapter"))
    assert (adapter["base_model_relation"], adapter["library_name"]) == ("adapter", "peft")
    of_mlx, _ = split_card(card(facts, {"verified": {"readers": {"mlx-lm": {}}}, "versions": {}}, "adapter"))
    assert of_mlx["library_name"] == "mlx"


def test_a_base_that_is_a_folder_is_called_by_its_name_and_never_by_its_place(facts, run):
    text = card(facts, REPORT)
    assert (facts.base, facts.on_hub) == ("base", False)
    assert "base_model" not in split_card(text)[0] and "`base`" in text and str(run.parent) not in text


@pytest.mark.parametrize(
    ("name", "folder", "said", "expected"),
    [
        ("org/name", "anywhere/abc", "", ("org/name", True)),
        ("here", "here", "", ("here", False)),
        ("here", "here", "org/name", ("org/name", True)),
        ("x", "hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/0a1b", "", ("HuggingFaceTB/SmolLM2-135M", True)),
    ],
)
def test_the_base_is_named_as_the_hub_knows_it_where_that_is_known(name, folder, said, expected, tmp_path):
    (tmp_path / folder).mkdir(parents=True)
    assert base_name(name, tmp_path / folder, said) == expected


def test_the_numbers_are_those_of_the_data_and_the_run(facts, run):
    info = json.loads((run.parent / "dataset" / "dataset.json").read_text())
    text = card(facts, REPORT)
    table, of_data = rows(text), rows(text[text.index("## Data") : text.index("## Method")])
    for name, source in (
        ("gptme conversations", "gptme"),
        ("[OpenAssistant](https://huggingface.co/OpenAssistant)", "openassistant"),
    ):
        learned = info["train"]["learned_tokens_by_source"][source]
        assert of_data[name][:2] == [str(info["train"]["conversations"][source]), f"{learned:,}"]
    assert table["rank"] == ["`4`"] and table["alpha"] == ["`8.0`"] and table["learning rate"] == ["`0.01`"]
    assert table["target modules"] == ["`q_proj, v_proj`"] and table["optimizer steps"] == ["`4`"]
    assert table["seed"] == ["`0`"] and table["engine"] == ["`mlx`"]
    losses = {row["step"]: row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["split"] == "valid"}
    assert table["**the loss**"] == [f"{losses[0]:.4f}", f"{losses[4]:.4f}"]
    assert table["engine: name"] == ["`mlx`"] and table["largest difference"] == ["`1.25e-05`"] and table["missing"] == ["`none`"]


def test_what_evaluate_measured_is_taken_where_it_is_of_this_checkpoint(facts, run):
    comparison, _ = compare(run, "step-000004")
    config, model, checkpoint = open_run(run, "step-000004")
    found = read_facts(run, checkpoint, model, config).held_out
    assert found == HeldOut(comparison.base.loss, comparison.tuned.loss, found.by_source, comparison.tuned.tokens, found.compared)
    text = card(replace(facts, held_out=found), REPORT)
    assert f"over {comparison.tuned.tokens:,} learned tokens of the valid split" in text and "not measured" not in text
    row = next(row for row in comparison.rows if row.group == "all")
    difference = f"{row.difference:+.4f} ({row.low:+.4f} to {row.high:+.4f})"
    assert rows(text)["**the loss**"] == [f"{row.tokens:,}", f"{row.base:.4f}", f"{row.tuned:.4f}", difference]
    assert rows(text)["inside a call"] and rows(text)["turns, first"] and "answers to held-out turns" not in text
    config, model, checkpoint = open_run(run, "step-000002")
    assert read_facts(run, checkpoint, model, config).held_out.tokens is None
    (run / "evaluation.json").unlink()


@pytest.mark.parametrize("damaged", ["{}", '{"base": {"loss": 1, "by_source": {}}, "tuned": null}', '{"base": 1, "tuned": {}}'])
def test_a_damaged_evaluation_is_one_line(run, damaged):
    config, model, checkpoint = open_run(run, "step-000004")
    (run / "evaluation.json").write_text(json.dumps({"checkpoint": "step-000004"} | json.loads(damaged)))
    with pytest.raises(UserError, match=r"evaluation\.json: not what evaluate writes"):
        read_facts(run, checkpoint, model, config)
    (run / "evaluation.json").unlink()


def test_rates_of_answers_stand_in_the_card_with_their_intervals_and_no_answer_does(facts, run):
    compare(run, "step-000004", wanted=Wanted(generate=4, limit=60))
    config, model, checkpoint = open_run(run, "step-000004")
    found = read_facts(run, checkpoint, model, config).held_out
    text = card(replace(facts, held_out=found), REPORT)
    samples = json.loads((run / "evaluation.json").read_text())["generation"]["samples"]
    assert rows(text)["valid call"][:3] == [str(len(samples)), "0 %", "0 %"] and "paired bootstrap over conversations" in text
    assert not any(word in text for word in WORDS.split())
    (run / "evaluation.json").unlink()


def test_what_was_not_measured_or_is_not_known_is_said(facts):
    assert "Held-out loss: not measured." in card(replace(facts, held_out=None), REPORT)
    assert "Its uncertainty was not measured." in card(facts, REPORT)
    assert "Not known any more" in card(replace(facts, sources={}, counts={}), REPORT)
    assert "names no licence" in card(replace(facts, base_card="# No front matter"), REPORT)


@pytest.mark.parametrize(
    ("license", "said"),
    [
        ("cc-by-sa-4.0", "share-alike"),
        ("cc-by-nc-sa-3.0", "share-alike"),
        ("gpl-3.0", "share-alike"),
        ("mit", "`mit`"),
        ("other", "LICENSE"),
    ],
)
def test_licences_of_base_and_data_are_named(license, said, facts):
    text = card(replace(facts, base_card=f"---\nlicense: {license}\n---\n"), REPORT)
    licence = text[text.index("## Licence") : text.index("## Versions")]
    assert said in licence and "OpenAssistant are under Apache-2.0" in licence
    assert ("share-alike" in licence) == (said == "share-alike")
    assert split_card(text)[0]["license"] == license


@pytest.mark.parametrize(
    "front",
    [
        "---\n[\n---\nbelow",
        "---\n- a\n---\nbelow",
        "\ufeff---\r\nlicense: mit\r\n---\r\nbelow",
        "below",
        "---\n!!python/object:os.x\n---\nbelow",
    ],
)
def test_a_base_card_of_any_kind_is_kept_below(front, facts):
    settings, below = split_card(front)
    assert below == "below" and settings in ({}, {"license": "mit"})
    assert card(replace(facts, base_card=front), REPORT).endswith("below\n")


def test_what_the_base_says_of_itself_cannot_break_out_of_the_front_matter(facts):
    evil = "x\n---\n# Owned\nlicense: mit"
    base_card = f"---\n{yaml.safe_dump({'license': evil, 'language': {'a': 1}, 'license_name': ['ok', 'b: c']})}---\n"
    text = card(replace(facts, base_card=base_card, base="a|b`c\n# Owned", role_policy="x | y\n# Owned"), REPORT)
    settings, below = split_card(text)
    assert settings["license"] == evil and settings["license_name"] == ["ok", "b: c"] and "language" not in settings
    assert "\n# Owned" not in below


def test_the_card_says_how_gptme_reaches_it(facts):
    assert "gptme -m local/DIR --tool-format" in card(facts, REPORT) and "mlx_lm.server --model DIR" in card(facts, REPORT)
    assert "11434" in card(facts, REPORT, "gguf")
    assert "--lora DIR/FILE.gguf" in card(facts, REPORT, "gguf adapter")


@pytest.mark.parametrize("formats", [("peft",), ("mlx-lm",), ("peft", "mlx-lm")])
def test_the_card_of_an_adapter_names_what_opens_it_and_nothing_else(formats, facts):
    first, *others = formats
    text = card(facts, {"verified": {"readers": {first: {}}, "not_asked": others}, "versions": {}}, "adapter")
    assert ("--adapter-path DIR" in text, "PeftModel.from_pretrained" in text) == ("mlx-lm" in formats, "peft" in formats)


def test_no_word_of_a_conversation_stands_in_it(facts, run):
    for kind in ("model", "adapter", "gguf", "gguf adapter"):
        text = card(facts, REPORT, kind)
        assert not any(word in text for word in (*WORDS.split(), "log-1", str(run.parent)))
