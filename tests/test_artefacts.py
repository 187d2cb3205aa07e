"""Each thing that is made says from what: by content, so that it is found again wherever it lies, and by no place on a machine."""

import hashlib
import json
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Answer
from finished_runs import make_base, make_run

from mlx_finetune.evaluation.compare import find_checkpoint, open_run
from mlx_finetune.export.facts import read_facts
from mlx_finetune.files import read_json
from mlx_finetune.models.weights import fingerprint
from mlx_finetune.training.manifest import is_of, made_from

Cli = Callable[..., Answer]


@dataclass(frozen=True)
class MadeOf:
    """What the run learned from, by content."""

    run: Path
    data: str
    model: str
    manifest: str  # SHA-256 of the checkpoint's

    @property
    def all(self) -> dict[str, str]:
        """As every later artefact says it."""
        name = find_checkpoint(self.run, "best").name
        return {"checkpoint": name, "sha256": self.manifest, "data": self.data, "model": self.model}


def settings(run: Path) -> dict[str, Any]:
    """Of a run."""
    return dict(yaml.safe_load((run / "config.yaml").read_text()))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeOf:
    """A run and what it was made of, asked of the files themselves."""
    root = tmp_path_factory.mktemp("made")
    make_base(root)
    run = make_run(root, "mlx")
    manifest = (run / "best" / "manifest.json").read_bytes()
    data, model = (Path(settings(run)[name]) for name in ("data", "model"))
    return MadeOf(run, read_json(data / "dataset.json")["id"], fingerprint(model), hashlib.sha256(manifest).hexdigest())


def test_a_run_and_its_checkpoints_say_which_data_and_base_they_are_of(made: MadeOf) -> None:
    for path in (made.run / "made_from.json", made.run / "best" / "progress.json"):
        told = read_json(path)
        assert (told["data"], told["model"]) == (made.data, made.model) and told["versions"]["mlx-finetune"]


def test_an_evaluation_says_which_checkpoint_data_and_base_it_is_of(made: MadeOf, cli: Cli) -> None:
    assert cli("evaluate", made.run, "--generate", "0")[0] == 0
    told = read_json(made.run / "evaluation.json")
    assert told["made_from"] == made.all and told["versions"]["mlx-finetune"]


def test_an_evaluation_of_a_checkpoint_with_other_contents_is_not_taken_for_one_of_this(made: MadeOf, cli: Cli) -> None:
    assert cli("evaluate", made.run, "--generate", "0")[0] == 0
    config, model, checkpoint = open_run(made.run, "best")
    found = read_facts(made.run, checkpoint, model, config).held_out
    assert found and found.compared
    path = made.run / "evaluation.json"
    told = read_json(path)
    path.write_text(json.dumps(told | {"made_from": told["made_from"] | {"sha256": "0" * 64}}))
    found = read_facts(made.run, checkpoint, model, config).held_out
    assert found is None or not found.compared  # the run's own looks are shown
    assert is_of({name: value for name, value in told.items() if name != "made_from"}, made_from(checkpoint))  # of an older version


@pytest.mark.parametrize("verb", [["fuse"], ["export", "--to", "peft"], ["export", "--to", "mlx-lm"]])
def test_a_folder_that_is_handed_back_says_it_in_its_verification_and_on_its_card(
    made: MadeOf, verb: list[str], cli: Cli, tmp_path: Path
) -> None:
    status, _, said = cli(verb[0], made.run, *verb[1:], "--out", tmp_path / "out")
    assert status == 0, said
    assert read_json(tmp_path / "out" / "verification.json")["made_from"] == made.all
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"`{value}`" in card for value in made.all.values())
    assert str(made.run.parent) not in card


@pytest.mark.parametrize("adapter_only", [False, True])
def test_a_gguf_says_it_in_keys_of_its_own(made: MadeOf, adapter_only: bool, cli: Cli, tmp_path: Path) -> None:
    from gguf import GGUFReader

    more = ["--adapter-only"] if adapter_only else []
    status, _, said = cli("export", made.run, "--to", "gguf", *more, "--out", tmp_path / "out")
    assert status == 0, said
    reader = GGUFReader(next((tmp_path / "out").glob("*.gguf")))
    for key, value in made.all.items():
        field = reader.get_field(f"mlx-finetune.{key}")
        assert field and field.contents() == value
    assert all(f"`{value}`" in (tmp_path / "out" / "README.md").read_text() for value in made.all.values())


def test_a_report_shows_it(made: MadeOf, cli: Cli, tmp_path: Path) -> None:
    assert cli("report", made.run, "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert made.data in page and made.model in page and find_checkpoint(made.run, "best").name in page


def test_a_converted_model_says_of_which_weights_it_is(made: MadeOf, cli: Cli, tmp_path: Path) -> None:
    model = settings(made.run)["model"]
    assert cli("convert", model, "--out", tmp_path / "out")[0] == 0
    told = read_json(tmp_path / "out" / "origin.json")
    assert told["fingerprint"] and told["versions"]["mlx-finetune"] and told["format"] == "huggingface"


def test_the_prepared_data_says_of_which_conversations_and_model_it_is(made: MadeOf, cli: Cli, tmp_path: Path) -> None:
    model = settings(made.run)["model"]
    told = "prepare", made.run.parent / "gptme.jsonl", "--model", model, "--max-length", "256"
    assert cli(*told, "--out", tmp_path / "out")[0] == 0
    found = read_json(tmp_path / "out" / "dataset.json")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out", made.run)] == [0o700, 0o700]  # for nobody else
    assert found["model_fingerprint"] == made.model and found["conversations"] and found["id"]
