"""Before a run loads its model it says what that takes, and one that cannot fit is refused with what to change."""

from pathlib import Path

import pytest
from chats import chat, conversation_of
from tiny_models import make_tiny

from mlx_finetune.cli import main
from mlx_finetune.data.conversation import write_conversations
from mlx_finetune.planning.machine import Machine


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
