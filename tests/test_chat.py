"""A chat in the terminal: through pipes, and through a terminal of its own."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from io import StringIO
from pathlib import Path

import pytest
from finished_runs import runs_of_both

from mlx_finetune.data.conversation import Message
from mlx_finetune.serving.chat import Chat, Settings
from mlx_finetune.serving.opened import BASE, TUNED, Opened, find_source

COLOUR = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return runs_of_both(tmp_path_factory.mktemp("chat"), context=100)


@pytest.fixture(scope="module", params=["mlx", "torch"])
def opened(request: pytest.FixtureRequest, runs: dict[str, Path]) -> Opened:
    return Opened(find_source(str(runs[request.param]), "", ""))


def answer_of(opened: Opened, variant: str, *messages: Message) -> str:
    opened.forget()
    prompt = [int(token) for token in opened.template.prompt(messages)]
    return opened.template.decode(list(opened.generate(variant, prompt, 8)))


def said(opened: Opened, *lines: str, system: str = "") -> list[str]:
    out = StringIO()
    Chat(opened, Settings(system, 0.0, 1.0, 8, None)).run(StringIO("".join(f"{line}\n" for line in lines)), out)
    return out.getvalue().split("\n")


def shown(text: str) -> str:
    from mlx_finetune.data.shown import visible

    return visible(text)


def test_each_line_is_a_message_of_one_conversation_and_base_and_tuned_take_turns(opened: Opened) -> None:
    first = answer_of(opened, TUNED, Message("user", "list 1"))
    so_far = [Message("user", "list 1"), Message("assistant", first.strip()), Message("user", "b")]
    second = answer_of(opened, BASE, *so_far)
    third = answer_of(opened, TUNED, *so_far, Message("assistant", second.strip()), Message("user", "c"))
    expected = "".join(shown(text) + "\n" for text in (first, second, third))
    assert "\n".join(said(opened, "list 1", "/base", "b", "", "/tuned", "c", "/exit", "never")) == expected
    assert first != answer_of(opened, BASE, Message("user", "list 1"))


def test_reset_and_system_begin_anew(opened: Opened, capsys: pytest.CaptureFixture[str]) -> None:
    system = Message("system", "Be kind.")
    alone, told = (answer_of(opened, TUNED, *lead, Message("user", "a")) for lead in ((), (system,)))
    lines = ("a", "/reset", "a", "/system Be kind.", "a", "/reset", "a", "/system", "a")
    assert "\n".join(said(opened, *lines)) == "".join(shown(text) + "\n" for text in (alone, alone, told, told, alone))
    begun = [line.removeprefix("begun anew, ") for line in capsys.readouterr().err.splitlines() if line.startswith("begun anew")]
    assert begun == ["without system prompt", "with a system prompt", "with a system prompt", "without system prompt"]
    assert "\n".join(said(opened, "a", system="Be kind.")) == shown(told) + "\n"


def test_tokens_are_the_very_tokens_of_prompt_and_answer(opened: Opened) -> None:
    *_, shown_tokens, counts, end = said(opened, "list", "/tokens")
    prompt = opened.template.prompt([Message("user", "list")]).tolist()
    assert counts == f"{len(prompt)} tokens read, 8 written" and end == ""
    assert shown_tokens.count("⟦") <= 8
    whole = "\n".join(said(opened, "list", "/tokens"))
    pieces = opened.template.pieces(prompt)
    assert "|".join(piece.replace("\n", "↵\n") for piece in pieces) + "|⟦" in whole


def test_what_goes_wrong_is_a_line_and_the_chat_goes_on(opened: Opened, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(opened, "/nonsense", "/tokens", "a b " * 100, "/help", "/usr/bin is a path")
    lines = capsys.readouterr().err
    for words in ("there is no /nonsense", "nothing was asked yet", "the context is 100", "/system TEXT", "ended after 8 tokens"):
        assert words in lines, lines
    assert len(out) == 2 and out[1] == ""


def test_the_command_reads_a_pipe_and_also_a_model_without_a_run(runs: dict[str, Path]) -> None:
    command = [
        sys.executable,
        "-m",
        "mlx_finetune",
        "chat",
        str(runs["mlx"].parent / "base"),
        "--engine",
        "torch",
        "--max-tokens",
        "4",
    ]
    done = subprocess.run(command, input=b"hello\n\xff\n/base\n/tuned\n", capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"\n") >= 2 and b"there is nothing to switch" in done.stderr and b"Traceback" not in done.stderr


def test_ctrl_c_ends_the_answer_and_ctrl_d_the_chat(runs: dict[str, Path]) -> None:
    """In a real terminal, whose prompt is waited for."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-m", "mlx_finetune", "chat", str(runs["torch"]), "--max-tokens", "60"])
    read = b""

    def until(words: str) -> None:
        nonlocal read
        deadline = time.monotonic() + 60
        while words not in COLOUR.sub("", read.decode(errors="replace")):
            assert time.monotonic() < deadline, read
            if select.select([terminal], [], [], 0.2)[0]:
                read += os.read(terminal, 4096)
        read = b""
        time.sleep(0.3)  # until it waits for a key, after its prompt is written

    try:
        until("tuned>")
        os.write(terminal, b"list 1\r")
        until("list 1")
        os.kill(child, signal.SIGINT)
        until("tuned>")
        os.write(terminal, b"/base\r")
        until("base>")
        os.kill(child, signal.SIGINT)  # at the prompt: only what was typed is dropped
        until("base>")
        os.write(terminal, b"\x04")
        deadline = time.monotonic() + 20
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            assert time.monotonic() < deadline
            if select.select([terminal], [], [], 0.1)[0]:
                with suppress(OSError):  # it has gone
                    os.read(terminal, 4096)
        assert os.waitstatus_to_exitcode(ended[1]) == 0
        child = 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(terminal)
