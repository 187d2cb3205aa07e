"""Before a run loads its model it says what that takes, and one that cannot fit is refused with what to change."""

import re
from pathlib import Path

import psutil
import pytest
from chats import chat, conversation_of
from tiny_models import make_tiny

from mlx_finetune.cli import main
from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.planning.machine import Machine
from mlx_finetune.training.run import packed


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[str, str]:
    model = make_tiny("llama", tmp_path / "model", tokenizer=True)
    write_conversations(
        tmp_path / "c.jsonl", [conversation_of(chat("do it " * 40 + str(i), "done " * 30), f"g{i}") for i in range(6)]
    )
    arguments = ["--model", str(model), "--out", str(tmp_path / "data"), "--max-length", "512"]
    assert run(["prepare", str(tmp_path / "c.jsonl"), *arguments]) == 0
    return str(model), str(tmp_path / "data")


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    return int(exit_.value.code or 0)


def small_machine() -> Machine:
    return Machine("a small machine", 2**20, 2**19, "half of it", None, on_gpu=False)


def test_a_run_says_how_much_memory_it_takes_and_how_much_there_is(
    prepared: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = prepared
    assert run(["train", "--engine", "mlx", "--model", model, "--data", data, "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    assert " of memory; " in capsys.readouterr().err


def test_a_run_that_does_not_fit_is_refused_before_anything_is_there(
    prepared: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_finetune.planning.before_run.this_machine", small_machine)
    model, data = prepared
    assert run(["train", "--engine", "mlx", "--model", model, "--data", data, "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "the run needs" in told and "0 MB may be used" in told.replace("1 MB", "0 MB") and "Traceback" not in told
    assert not (tmp_path / "run").exists()


def test_as_much_is_folded_together_as_the_largest_micro_batch_has(prepared: tuple[str, str]) -> None:
    dataset = Dataset.open(Path(prepared[1]))
    longest = -(-(max(dataset.train.lengths) - 1) // 32) * 32

    def folded(**values: object) -> int | None:
        return packed(make_config({"engine": "mlx", "batch_size": 2} | values, "test"), dataset).pack_length

    assert folded() == 2 * longest and folded(pack_length=900) == 900
    assert folded(share_prefixes="never") is None and folded(engine="torch") == 2 * longest


def test_train_says_what_folding_more_together_would_save(
    prepared: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = prepared
    places = ["train", "--engine", "mlx", "--model", model, "--data", data, "--out", str(tmp_path / "run"), "--dry-run"]
    assert run(places) == 0
    found = re.search(r"with pack_length=(\d+) (\d+)% fewer tokens", capsys.readouterr().err)
    assert found and int(found[2]) > 30  # 5 rows of 333 tokens, which share most of what was asked
    assert 2 * 352 <= int(found[1]) < 4 * 352
    for more in (f"pack_length={found[1]}", "share_prefixes=never", "gradient_accumulation=1"):
        assert run([*places, "--set", more]) == 0
        assert "fewer tokens" not in capsys.readouterr().err


def test_more_folded_together_than_fits_is_refused_by_name(
    prepared: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine("a machine", 2**28, 2**27, "half of it", None, on_gpu=False)
    monkeypatch.setattr("mlx_finetune.planning.before_run.this_machine", lambda: machine)
    model, data = prepared
    places = ["train", "--engine", "mlx", "--model", model, "--data", data, "--out", str(tmp_path / "run"), "--dry-run"]
    asked = [*places, "--set", "batch_size=1", "--set", "gradient_accumulation=512", "--set", "pack_length=1m"]
    assert run(asked) == 2
    told = capsys.readouterr().err
    assert "pack_length = 1048576 needs" in told and "set pack_length=null" in told and not (tmp_path / "run").exists()
    assert run([*asked, "--set", "share_prefixes=never"]) == 0  # where it does nothing it is no reason
    assert run([*asked, "--set", "gradient_accumulation=1"]) == 0  # no more than a step has


def test_a_run_that_does_not_fit_is_not_blamed_on_what_is_folded(
    prepared: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_finetune.planning.before_run.this_machine", small_machine)
    model, data = prepared
    places = ["--model", model, "--data", data, "--out", str(tmp_path / "run")]
    assert run(["train", "--engine", "mlx", *places, "--set", "pack_length=64"]) == 2
    assert "the run needs" in capsys.readouterr().err


def test_a_run_that_memory_ran_short_in_is_saved_and_says_how_it_goes_on(
    prepared: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = psutil.virtual_memory()._replace(available=2**20)
    model, data = prepared
    places = ["--model", model, "--data", data, "--out", str(tmp_path / "run"), "--set", "gradient_accumulation=2"]
    with monkeypatch.context() as patched:
        patched.setattr(psutil, "virtual_memory", lambda: memory)
        assert run(["train", "--engine", "mlx", *places]) == 130
    told = capsys.readouterr().err
    assert "stopped for want of memory: 0.0 of" in told and "step 1 of 3 is saved" in told
    command = told.split("next: mlx-finetune ")[-1].split()
    assert command[:2] == ["train", "--resume"] and "grad_checkpoint=1" in command
    assert run(command) == 0
