"""init: from this machine and a few answers to a commented config.yaml that `run` reads."""

import json
import os
import pty
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from conftest import Answer

from mlx_finetune.errors import UserError
from mlx_finetune.init_command import _values
from mlx_finetune.init_questions import chat_files, exports, logs_in, model_of, yes_or_no
from mlx_finetune.planning.candidates import advised, candidates, known_shapes
from mlx_finetune.planning.machine import GIB, Machine, find_chip, planned_machine
from mlx_finetune.road import load_road

LOGS = Path(__file__).parents[1] / "mlx_finetune" / "sample" / "gptme-logs"
CPU = Machine("a CPU", 16 * GIB, 13 * GIB, "", None, on_gpu=False)
# As the makers count them.
PUBLISHED = (134_515_008, 361_821_120, 1_543_714_304, 4_022_468_096, 7_615_616_512, 14_770_033_664, 32_763_876_352)


def mac(chip: str, memory: int) -> Machine:
    return planned_machine(find_chip(chip), memory * GIB)


def test_the_models_of_the_list_have_as_many_parameters_as_published() -> None:
    assert tuple(shape.parameters for shape in known_shapes()) == PUBLISHED


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        (mac("M1", 8), "mlx-community/Qwen2.5-Coder-1.5B-Instruct-4bit"),
        (mac("M2", 16), "mlx-community/Qwen3-4B-Instruct-2507-4bit"),
        (mac("M3 Pro", 36), "mlx-community/Qwen2.5-Coder-14B-Instruct-4bit"),
        (mac("M2 Ultra", 128), "Qwen/Qwen2.5-Coder-32B-Instruct"),
        (CPU, "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ],
)
def test_what_is_advised_fits_with_whole_windows_and_all_layers(machine: Machine, name: str) -> None:
    best = advised(candidates(machine), machine)
    assert best is not None and best.whole
    assert (best.packed or best.shape.name) == name


def test_much_to_learn_advises_a_smaller_model_and_a_tiny_machine_none() -> None:
    machine = mac("M2", 16)
    found = candidates(machine)
    few, many = (advised(found, machine, tokens) for tokens in (10**6, 10**8))
    assert few and many and many.shape.parameters < few.shape.parameters
    tiny = Machine("tiny", GIB // 8, GIB // 16, "", None)
    assert advised(candidates(tiny), tiny) is None


def test_on_cuda_bits_are_those_of_bitsandbytes_and_nothing_is_set_that_torch_lacks() -> None:
    card = Machine("a card", 16 * GIB, 14 * GIB, "", None)
    model = model_of("Qwen/Qwen2.5-Coder-7B-Instruct", candidates(card), card)
    values = _values(model, card, "torch")
    assert values["model"] == "Qwen/Qwen2.5-Coder-7B-Instruct" and values["quantization"] == "4bit"
    assert "attention" not in values


@pytest.mark.parametrize(
    ("parse", "bad", "good", "value"),
    [
        (yes_or_no, "maybe", "Yes", True),
        (exports, "gguff", "gguf, ollama", ("gguf", "ollama")),
        (exports, "zip", "none", ()),
        (chat_files, "no.jsonl", "org/chats", ("org/chats",)),
        (logs_in, "nowhere", str(LOGS), 11),
    ],
)
def test_an_answer_is_checked(parse: Callable[[str], object], bad: str, good: str, value: object) -> None:
    with pytest.raises(UserError):
        parse(bad)
    found = parse(good)
    assert getattr(found, "conversations", found) == value


def test_a_model_is_a_number_a_name_a_folder_or_any_hub_id(small_model: Path) -> None:
    found = candidates(CPU)
    assert model_of("2", found, CPU).name == "HuggingFaceTB/SmolLM2-360M-Instruct"
    assert model_of("qwen3-4b-instruct-2507", found, CPU).known is found[3]
    assert model_of("org/quokka", found, CPU).known is None
    known = model_of(str(small_model), found, CPU).known
    assert known and known.choice.fits
    for bad in ("0", "99", "no such", str(LOGS)):
        with pytest.raises(UserError):
            model_of(bad, found, CPU)


def test_yes_writes_a_file_that_run_reads(cli: Callable[..., Answer], small_model: Path, tmp_path: Path) -> None:
    status, out, err = cli("init", "c.yaml", "--yes", "--logs", LOGS, "--model", small_model, "--to", "gguf", "--json")
    assert status == 0 and json.loads(out)["conversations"] == 11 and "next: mlx-finetune run c.yaml" in err
    text = (tmp_path / "c.yaml").read_text()
    told = yaml.safe_load(text)
    assert told["collect"] == {"logs": str(LOGS)} and told["hand_back"] == {"export": ["gguf"]}
    assert told["model"] == str(small_model) and "# learning_rate: 0.0002  # at the end of the warmup" in text
    road = load_road(tmp_path / "c.yaml", {})
    assert road.hand_back.export == ("gguf",) and road.config.model == str(small_model)
    status, out, err = cli("init", "c.yaml", "--yes", "--logs", LOGS)
    assert status == 2 and "c.yaml exists already" in err
    assert (tmp_path / "c.yaml").read_text() == text


@pytest.mark.long
def test_run_takes_what_init_wrote(cli: Callable[..., Answer], small_model: Path, tmp_path: Path) -> None:
    assert cli("init", "--yes", "--logs", LOGS, "--model", small_model)[0] == 0
    status, _, err = cli("run", "config.yaml", "--dry-run")
    assert status == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_places_beside_the_file_are_seen_from_it_so_that_all_can_be_moved(
    cli: Callable[..., Answer], small_model: Path, tmp_path: Path
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(LOGS, old / "logs")
    shutil.copytree(small_model, old / "models" / "small")
    status, _, said = cli("init", old / "config.yaml", "--yes", "--model", old / "models" / "small", "--logs", old / "logs")
    assert status == 0, said
    found = yaml.safe_load((old / "config.yaml").read_text())
    assert (found["model"], found["collect"]["logs"]) == ("./models/small", "./logs")
    old.rename(new)
    road = load_road(new / "config.yaml", {})
    assert (road.config.model, road.collect.logs) == (str(new / "models" / "small"), str(new / "logs"))
    assert cli("run", new / "config.yaml", "--dry-run")[0] == 0


def test_without_a_terminal_or_anything_to_learn_from_it_is_refused_with_a_hint(
    cli: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTME_LOGS_HOME", str(tmp_path / "none"))
    status, _, err = cli("init")
    assert status == 2 and "hint: mlx-finetune init --yes takes the defaults" in err
    status, _, err = cli("init", "--yes")
    assert status == 2 and "no gptme conversations" in err and "--logs FOLDER" in err
    assert not any(tmp_path.iterdir())


def typed(arguments: Sequence[str], answers: Sequence[str], folder: Path) -> tuple[int, str]:
    """Runs it on a terminal of its own, answering each question; exit status and all that was shown."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.execv(sys.executable, [sys.executable, "-m", "mlx_finetune", *arguments])
    shown, left = b"", list(answers)
    while select.select([terminal], [], [], 60)[0]:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # its end was closed
            break
        if not part:
            break
        shown += part
        if shown.endswith(b"]: ") and left:
            time.sleep(0.3)  # a Ctrl-C in front of the read itself waits for the next key
            os.write(terminal, left.pop(0).encode())
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail(f"nothing more for a minute after: {shown!r}")
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown.decode()


def test_a_bad_answer_is_asked_again_and_enter_takes_the_default(small_model: Path, tmp_path: Path) -> None:
    answers = ["/nowhere\n", f"{LOGS}\n", "perhaps\n", "\n", "99\n", f"{small_model}\n", "gguff\n", "\n"]
    status, shown = typed(["init", "c.yaml"], answers, tmp_path)
    assert status == 0, shown
    assert "11 conversations" in shown and "neither yes nor no" in shown and "no such number" in shown
    assert "did you mean gguf?" in shown and "*1 SmolLM2-135M-Instruct" in shown
    assert load_road(tmp_path / "c.yaml", {}).collect.logs == str(LOGS)


@pytest.mark.long
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    status, shown = typed(["init"], ["\x03"], tmp_path)
    assert status == 130 and "interrupted" in shown
    assert not any(tmp_path.iterdir())
