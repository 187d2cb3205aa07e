"""What a verb leaves when it is asked to end, and what it says and does not say on stderr."""

import errno
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from conftest import Answer
from killed_runs import finish, log, make_data, measures, same, settings, start, steps_done, writes
from tiny_models import make_tiny

from mlx_finetune.ending import ended_by_sigterm, heard_everywhere
from mlx_finetune.errors import UserError, no_memory
from mlx_finetune.evaluation.compare import find_checkpoint
from mlx_finetune.export.convert import How, convert
from mlx_finetune.models.importing import find_source
from mlx_finetune.models.quiet import REMARKS, quietly
from mlx_finetune.models.weights import file_headers
from mlx_finetune.training.checkpoint import load_checkpoint
from mlx_finetune.training.checkpoints import last_whole
from mlx_finetune.training.interrupt import interruptible
from mlx_finetune.training.memory_watch import again

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


PRESSED = """
import os, signal, sys
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Press())
from mlx_finetune.__main__ import main
main({arguments!r})
"""


@pytest.mark.parametrize(
    ("module", "said"),
    [("mlx_finetune.cli_serve", "nothing was begun"), ("mlx_finetune.data.prepare", "nothing half-written is left")],
)
def test_ctrl_c_while_libraries_are_loaded_is_one_line(module: str, said: str, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("{}\n")
    arguments = ["prepare", str(tmp_path / "chats.jsonl"), "--model", str(tiny_llama), "--out", str(tmp_path / "data")]
    program = PRESSED.format(module=module, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, f"interrupted: {said}"), done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "data").exists()


class Removed:
    """Its removing is where the Ctrl-C falls."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)
        sum(range(10))


def test_ctrl_c_while_an_object_is_removed_is_heard_behind_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), heard_everywhere():
        one = Removed()
        del one
        time.sleep(0.1)
        raise AssertionError("not heard")
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not bound the memory of a process")
def test_no_memory_for_the_libraries_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("{}\n")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (400 << 20,) * 2); "  # less than torch's library has
    program = limit + "from mlx_finetune.__main__ import main; main()"
    arguments = ["prepare", str(tmp_path / "chats.jsonl"), "--model", str(tiny_llama), "--out", str(tmp_path / "data")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "error: there is no memory" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("hint: close other programs")


def test_a_library_that_ctypes_found_no_memory_for_is_no_memory_and_a_file_called_so_is_not() -> None:
    assert no_memory(OSError("libgomp.so.1: failed to map segment from shared object"))
    assert not no_memory(ImportError("libgomp.so.1: cannot allocate memory in static TLS block"))
    assert not no_memory(OSError("a.so: failed to map segment from shared object: Operation not permitted"))
    assert not no_memory(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "out of memory.txt"))


@pytest.mark.parametrize(("processes", "after"), [("1", signal.SIG_DFL), ("2", signal.SIG_IGN)])
def test_sigterm_is_heard_after_a_run_that_ended_by_itself_but_by_a_launcher_s_processes(
    processes: str, after: signal.Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    try:
        with interruptible() as interrupt:
            interrupt.ending = True
        assert signal.getsignal(signal.SIGTERM) is after
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_command_line_that_sigterm_ended_leaves_the_signal_as_it_was() -> None:
    with pytest.raises(SystemExit), ended_by_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


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


def test_the_command_that_goes_on_with_a_run_can_be_pasted_whatever_its_folder_is_called() -> None:
    assert shlex.split(again("my runs/it's one")) == ["mlx-finetune", "train", "--resume", "--out", "my runs/it's one"]
    assert again("run").endswith(" --out run")


def ask(process: BaseProcess, run: Path, is_now: Callable[[Path], bool]) -> None:
    """Ctrl-C at the moment."""
    until = time.monotonic() + WAIT
    while process.is_alive() and not is_now(run) and time.monotonic() < until:
        time.sleep(0.001)
    assert process.is_alive() and process.pid
    os.kill(process.pid, signal.SIGINT)


ONCE: dict[str, Callable[[Path], bool]] = {"step": lambda run: steps_done(run) > 0, "held-out loss": measures, "saving": writes}


@pytest.mark.long
@pytest.mark.parametrize("moment", ONCE)
def test_ctrl_c_saves_after_the_step_and_says_how_to_go_on_and_the_end_is_the_same(
    engine_name: str, moment: str, tiny_llama: Path, tmp_path: Path
) -> None:
    values, run = settings(tiny_llama, make_data(tiny_llama, tmp_path), engine_name, steps=12), tmp_path / "run"
    ask(process := start(run, values), run, ONCE[moment])
    process.join(WAIT)
    said = log(run).read_text()
    assert process.exitcode == 130 and "Traceback" not in said
    saved = (run / "latest").resolve().name.removeprefix("step-")
    assert f"interrupted: step {int(saved)} of 12 is saved\nnext: mlx-finetune train --resume --out {run}" in said
    finish(run, values)
    finish(tmp_path / "straight", values)
    assert same(run, tmp_path / "straight") == []


@pytest.mark.long
@pytest.mark.parametrize("moment", ["loading", *ONCE])
def test_a_second_ctrl_c_leaves_at_once_and_what_was_saved_is_whole(
    engine_name: str, moment: str, tiny_llama: Path, tmp_path: Path
) -> None:
    values, run = settings(tiny_llama, make_data(tiny_llama, tmp_path), engine_name, steps=2000), tmp_path / "run"
    process = start(run, values)
    if moment == "loading":  # nothing to save: the first one leaves
        ask(process, run, Path.is_dir)
    else:
        ask(process, run, ONCE[moment])
        time.sleep(0.02)
        if process.is_alive() and process.pid:
            os.kill(process.pid, signal.SIGINT)
    process.join(WAIT)
    said = log(run).read_text()
    assert process.exitcode == 130 and "Traceback" not in said and "interrupted" in said
    if moment == "loading":  # by chance before the folder was locked, or while it was being removed again
        assert not run.exists() or {path.name for path in run.iterdir()} <= {".lock"}
    found, damaged = last_whole(run)
    assert not damaged and (found is None or load_checkpoint(found)) and not writes(run)


DEAF = """
import hashlib, os, signal, threading, time
from mlx_finetune.training import interrupt
interrupt.GRACE = 0.2
def press():
    for _ in range(2):
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=press, daemon=True).start()
with interrupt.interruptible():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""


def test_a_second_ctrl_c_is_heard_in_the_midst_of_code_that_does_not_listen() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", DEAF], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 130 and time.monotonic() - began < 100
    assert done.stderr.strip() == "interrupted at once"  # it may be that nothing was saved
