"""Before a run loads its model it says what that takes, and one that cannot fit is refused with what to change."""

from pathlib import Path

import pytest
from chats import chat, conversation_of
from tiny_models import make_tiny

from mlx_finetune.cli import main
from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.planning.before_run import with_pack_length
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


def test_rows_are_folded_as_far_as_memory_allows(prepared: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = prepared
    train = Dataset.open(Path(data)).train
    longest = -(-(max(train.lengths) - 1) // 32) * 32
    values = {"engine": "mlx", "batch_size": 2}

    def folded(usable: int, **more: object) -> int | None:
        machine = Machine("a machine", 2 * usable, usable, "half of it", None, on_gpu=False)
        monkeypatch.setattr("mlx_finetune.planning.before_run.this_machine", lambda: machine)
        return with_pack_length(Path(model), make_config(values | more, "test"), train, 0.3).pack_length

    assert folded(2**40) == 8 * 2 * longest and folded(2**21) == 2 * longest
    between = {folded(int(2 ** (k / 8))) for k in range(21 * 8, 31 * 8)}
    assert between == {2 * longest * times for times in (1, 2, 4, 8)}
    assert folded(2**40, gradient_accumulation=3) == 2 * 2 * longest
    assert folded(2**21, pack_length=900) == 900 and folded(2**40, share_prefixes="never") is None


def test_more_folded_together_than_fits_is_refused_by_name(
    prepared: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine("a machine", 2**28, 2**27, "half of it", None, on_gpu=False)
    monkeypatch.setattr("mlx_finetune.planning.before_run.this_machine", lambda: machine)
    model, data = prepared
    places = ["--model", model, "--data", data, "--out", str(tmp_path / "run")]
    assert run(["train", "--engine", "mlx", *places, "--set", "pack_length=1m"]) == 2
    told = capsys.readouterr().err
    assert "pack_length = 1048576 needs" in told and "leave pack_length out" in told and not (tmp_path / "run").exists()
