"""What a verb leaves when it is asked to end, and what it says and does not say on stderr."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Answer
from tiny_models import make_tiny

from mlx_finetune.cli import ended_by_sigterm
from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.compare import find_checkpoint
from mlx_finetune.export.convert import How, convert
from mlx_finetune.models.importing import find_source
from mlx_finetune.models.quiet import REMARKS, quietly
from mlx_finetune.models.weights import file_headers
from mlx_finetune.training.interrupt import interruptible

WAIT = 60  # seconds that a slow machine may need before convert begins to write


def test_convert_that_is_killed_by_sigterm_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_finetune", "convert", str(tiny_llama), "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    until = time.monotonic() + WAIT
    while not list(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    begun = [path.name for path in tmp_path.iterdir()]
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=WAIT)
    assert begun and all(name.startswith(".out.") for name in begun)
    assert process.returncode == 143 and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_run_asked_to_end_still_ends_between_two_steps_and_the_command_line_ends_by_143_after_it() -> None:
    with pytest.raises(SystemExit) as ended, ended_by_sigterm():
        with interruptible() as interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupt.asked
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143


def test_processes_of_a_launcher_hear_sigterm_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)
    with ended_by_sigterm():
        assert signal.getsignal(signal.SIGTERM) is before


def test_only_the_known_remarks_of_a_logger_are_dropped() -> None:
    with quietly(), warnings.catch_warnings(record=True) as warned:
        warnings.warn("`rope_scaling` is deprecated and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
    assert [str(one.message) for one in warned] == ["something else is deprecated"]
    for name, remark in REMARKS.items():
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, said=said: said.append(record.getMessage())  # type: ignore[method-assign,misc]
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        for message in (f"xy {remark} because", "something is wrong"):  # whatever level other tests have set
            logger.handle(logger.makeRecord(name, logging.WARNING, __file__, 1, message, (), None))
        logger.removeHandler(handler)
        assert said == ["something is wrong"]


def test_a_tokenizer_that_cannot_be_read_is_found_before_weights_are_written(tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (model / "tokenizer.json").write_text('{"model": 3}')
    written: list[int] = []
    with pytest.raises(UserError, match="tokenizer"):
        convert(find_source(str(model)), tmp_path / "out", How(), lambda done, total: written.append(done))
    assert written == [] and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_bin_files_alone_is_sent_to_convert(cli: Callable[..., Answer], tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    (tmp_path / "chats.jsonl").write_text("{}\n")
    status, _, said = cli("prepare", tmp_path / "chats.jsonl", "--model", model, "--out", tmp_path / "data")
    assert status == 2
    assert said.splitlines()[-2:] == [
        f"error: {model}: no *.safetensors, only pytorch_model.bin",
        f"hint: mlx-finetune convert {model} --out DIR",
    ]


def test_an_unknown_architecture_is_told_the_nearest_one_and_to_train_it_with_torch(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", tokenizer=True)
    config = model / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "llamas"'))
    with pytest.raises(UserError) as refused:
        convert(find_source(str(model)), tmp_path / "out", How(), lambda done, total: None)
    assert "'llamas' (nearest in name is llama; docs/models.md" in refused.value.message and len(refused.value.message) < 130
    assert refused.value.hint == "train it with --engine torch"


def test_a_checkpoint_that_is_not_whole_is_not_called_missing(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "run" / "best").symlink_to(Path("checkpoints") / "step-000002")
    with pytest.raises(UserError, match=r"step-000002: no progress\.json: not a whole checkpoint") as refused:
        find_checkpoint(tmp_path / "run", "best")
    assert "--checkpoint" in refused.value.hint
    with pytest.raises(UserError, match="no checkpoint 'latest'"):
        find_checkpoint(tmp_path / "run", "latest")


@pytest.mark.parametrize(("beside", "hint"), [("", "bring the file back"), ("adapter_model.bin", "save it as safetensors")])
def test_an_absent_file_of_tensors_is_named_with_what_to_do(beside: str, hint: str, tmp_path: Path) -> None:
    if beside:
        (tmp_path / beside).touch()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: no such file") as refused:
        file_headers(tmp_path / "adapter_model.safetensors")
    assert hint in refused.value.hint
