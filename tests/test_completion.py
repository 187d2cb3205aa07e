"""Completion in bash, zsh and fish: verbs, options, and what an option takes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Answer

from mlx_finetune.cli import COMPLETING
from mlx_finetune.completion import choices_of
from mlx_finetune.config import FIELDS, RunConfig
from mlx_finetune.running.command import STAGES

Complete = Callable[[str], list[str]]


@pytest.fixture
def bash(cli: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> Complete:
    """What bash is told to offer for the last word of a line."""

    def complete(line: str) -> list[str]:
        monkeypatch.setenv(COMPLETING, "complete_bash")
        monkeypatch.setenv("COMP_WORDS", f"mlx-finetune {line}")
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" "))))
        return cli()[1].split()

    return complete


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("trai", ["train"]),
        ("train --engi", ["--engine"]),
        ("train --engine ", ["auto", "mlx", "torch"]),
        ("serve run --engine t", ["torch"]),
        ("train --report-to t", ["tensorboard", "trackio"]),
        ("train --set learning", ["learning_rate="]),
        ("train --set collect.s", []),
        ("run c.yaml --set collect.s", ["collect.since=", "collect.system="]),
        ("run c.yaml --until p", ["prepare"]),
        ("collect --until p", []),
        ("collect --system ", ["keep", "short", "none"]),
        ("collect --format x", ["xml"]),
        ("collect --tool-calls n", ["native"]),
        ("collect --relevant ", ["code", "any"]),
        ("prepare --validation-by ", ["time", "hash"]),
        ("inspect dataset --split ", ["train", "valid", "test"]),
        ("export run --to ", ["peft", "mlx-lm", "gguf", "ollama"]),
        ("export run --quantisation q4", ["q4_0", "q4_k_m"]),
        ("plan --chip M2", ["M2", "M2", "Pro", "M2", "Max", "M2", "Ultra"]),
        ("init --to g", ["gguf"]),
        ("evaluate --sandbox b", ["bwrap"]),
        ("chat --system ", []),
    ],
)
def test_what_an_option_takes_is_offered(bash: Complete, line: str, offered: list[str]) -> None:
    assert bash(line) == offered


def test_every_setting_is_offered_after_set(bash: Complete) -> None:
    assert bash("train --set ") == [f"{name}=" for name in FIELDS]


def test_the_checkpoints_offered_are_those_of_the_run_on_the_line(bash: Complete, tmp_path: Path) -> None:
    for step in (50, 100):
        (tmp_path / "mine" / "checkpoints" / f"step-{step:06}").mkdir(parents=True)
    assert bash("evaluate mine --checkpoint ") == ["best", "latest", "step-000050", "step-000100"]
    assert bash("fuse other --checkpoint ") == ["best", "latest"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_are_told_the_same(shell: str, cli: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMPLETING, f"complete_{shell}")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "mlx-finetune train --set optimizer=ada")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    out = cli()[1]
    values = [name for name in choices_of(RunConfig, "optimizer") if name.startswith("ada")]
    assert len(values) == 3 and all(f"optimizer={value}" in out for value in values) and "muon" not in out


def test_stages_offered_are_those_of_run(bash: Complete) -> None:
    assert bash("run c.yaml --until ") == list(STAGES)


def test_bash_itself_completes(tmp_path: Path) -> None:
    if not (bash := shutil.which("bash")):
        pytest.skip("no bash here")
    place = Path(sys.executable).parent
    script = f'eval "$({COMPLETING}=source_bash mlx-finetune)"; COMP_WORDS=(mlx-finetune inspe); COMP_CWORD=1; '
    script += '_mlx_finetune_completion mlx-finetune; echo "${COMPREPLY[@]}"'
    environment = os.environ | {"PATH": f"{place}:{os.environ['PATH']}"}
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "inspect\n"
