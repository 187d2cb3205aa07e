"""A mistake as a person would make it, and the one line that says what was meant."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Answer
from finished_runs import make_base
from hostile_model_readers import READERS

from mlx_finetune.cli import main

SAMPLE = Path(__file__).parents[1] / "mlx_finetune" / "sample"
RUN = "run is a run: evaluate, report, chat, serve, fuse and export take it"
DATASET = "dataset is a prepared data set: train --data and inspect take it"
COLLECTED = "collected is a collection: prepare takes it"
TRAIN = "train --model tiny-llama --data dataset --out o"

# What is typed in a folder that holds tiny-llama, gptme-logs, collected, dataset, run and settings.yaml; what is said of it.
MISTAKES = (
    ("trian", "Did you mean 'train'?"),
    ("inspekt dataset", "Did you mean 'inspect'?"),
    ("docter", "Did you mean 'doctor'?"),
    ("train --modle tiny-llama", "Possible options: --model"),
    ("evaluate run --chekpoint best", "Possible options: --checkpoint"),
    (f"{TRAIN} --set learnig_rate=1", "did you mean learning_rate?"),
    (f"{TRAIN} --set optimizer=adamW", "did you mean adamw?"),
    (f"{TRAIN} --set lr_schedule=cosin", "did you mean cosine?"),
    (f"{TRAIN} --engine mlxx", "did you mean mlx?"),
    (f"{TRAIN} --report-to tensorbord", "did you mean tensorboard?"),
    ("train --model tiny-llama --data datset --out o", "did you mean dataset?"),
    ("train --model tiny-lama --data dataset --out o", "did you mean tiny-llama?"),
    ("train --model tiny-llama --data collected --out o", COLLECTED),
    ("train --model tiny-llama --data run --out o", RUN),
    ("train --model run --data dataset --out o", RUN),
    ("train settings.yml", "did you mean settings.yaml?"),
    ("train run", RUN),
    ("train --resume --out rnu", "did you mean run?"),
    ("train --resume --out dataset", DATASET),
    ("prepare colected --model tiny-llama", "did you mean collected?"),
    ("prepare dataset --model tiny-llama --out o", DATASET),
    ("prepare run --model tiny-llama --out o", RUN),
    ("prepare gptme-logs --model tiny-llama --out o", "gptme-logs is a logs folder of gptme: collect takes it"),
    ("prepare collected --model ./tiny-lama --out o", "did you mean tiny-llama?"),
    ("inspect datset", "did you mean dataset?"),
    ("inspect run", RUN),
    ("inspect dataset --split trian", "did you mean train?"),
    ("evaluate rnu", "did you mean run?"),
    ("prepare collected --model Qwen/Qwen2.5-Coder-7B-Instrukt --out o", "did you mean Qwen/Qwen2.5-Coder-7B-Instruct?"),
    ("plan --model mlx-comunity/Qwen3-4B-Instruct-2507-4bit", "did you mean mlx-community/Qwen3-4B-Instruct-2507-4bit?"),
    ("evaluate dataset", DATASET),
    ("evaluate run --checkpoint lattest", "did you mean latest?"),
    ("evaluate run --checkpoint step-2", "did you mean step-000002?"),
    ("report rnu", "did you mean run?"),
    ("fuse dataset --out o", DATASET),
    ("fuse run --out o --checkpoint bst", "did you mean best?"),
    ("export run --to gguff --out o", "did you mean gguf?"),
    ("export run --to gguf --quantisation q4km --out o", "did you mean q4_k_m?"),
    ("chat rnu", "did you mean run?"),
    ("serve run --engine torhc", "did you mean torch?"),
    ("serve collected", COLLECTED),
    ("plan --model tiny-llama --chip 'M2 Por'", "did you mean M2 Pro?"),
    ("plan --model tiny-llama --data collected", COLLECTED),
    ("convert tiny-lama --out o", "did you mean tiny-llama?"),
    ("collect gptme-log --out o", "did you mean gptme-logs?"),
    ("collect dataset --out o", DATASET),
    ("collect gptme-logs --system shrt --out o", "did you mean short?"),
    ("collect gptme-logs --tool-calls nativ --out o", "did you mean native?"),
    ("push rnu me/mine", "did you mean run?"),
    ("demo --engine tourch --out o", "did you mean torch?"),
    ("doctor --model tiny-lama", "did you mean tiny-llama?"),
    ("init --yes --logs gptme-logs --model tiny-lama o.yaml", "did you mean tiny-llama?"),
    ("init --yes --logs gptme-logs --to gguff o.yaml", "did you mean gguf?"),
)


@pytest.fixture(scope="module")
def place(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one thing of each kind."""
    folder = tmp_path_factory.mktemp("place")
    READERS["metrics"].write(folder)
    (folder / "run" / "best").symlink_to("checkpoints/step-000002")
    (folder / "data").rename(folder / "dataset")
    shutil.copytree(small_model, folder / "tiny-llama")
    shutil.copytree(SAMPLE / "gptme-logs", folder / "gptme-logs")
    (folder / "settings.yaml").write_text("rank: 2\n")
    with pytest.raises(SystemExit) as exit:
        main(["collect", str(folder / "gptme-logs"), "--out", str(folder / "collected")])
    assert not exit.value.code
    return folder


@pytest.mark.parametrize(
    ("typed", "said"),
    [pytest.param(*each, id=each[0], marks=pytest.mark.long if each[0].startswith("prepare") else ()) for each in MISTAKES],
)
def test_what_was_meant_is_said(
    typed: str, said: str, place: Path, cli: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    status, out, err = cli(*shlex.split(typed))
    assert status == 2 and out == "" and "Traceback" not in err
    assert said in err
    assert not (place / "o").exists() and not (place / "o.yaml").exists()


@pytest.mark.long
def test_a_part_of_the_model_that_was_meant_is_said(cli: Callable[..., Answer], tmp_path: Path) -> None:
    make_base(tmp_path)
    said = cli("train", "--model", "base", "--data", "dataset", "--out", "o", "--set", "target_modules=q_porj")[2]
    assert "did you mean q_proj?" in said and not (tmp_path / "o").exists()


def test_a_checkpoint_that_is_not_there_is_not_what_was_meant(cli: Callable[..., Answer], tmp_path: Path) -> None:
    READERS["metrics"].write(tmp_path)
    (tmp_path / "run" / "latest").unlink()
    assert "error: run: no checkpoint 'best'\nhint: there are step-000002\n" in cli("evaluate", "run", "--checkpoint", "best")[2]


def test_a_folder_that_happens_to_be_called_nearly_so_is_not_what_an_error_of_a_setting_speaks_of(
    cli: Callable[..., Answer], tmp_path: Path
) -> None:
    (tmp_path / "the command lines").mkdir()
    assert "hint: did you mean rank?" in cli("train", "--set", "rnk=1")[2]
