"""gptme's own tests run against a served model: in a home of its own, with limits, and nothing that it starts outlives it."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from finished_runs import make_base, make_run

from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.confined import TOOLS, confined, confinement
from mlx_finetune.evaluation.gptme_eval import Suite, check_names, find_program, outcomes, run_suite, side_by_side

HELLO = "```save hello.py\nprint('Hello, world!')\n```"
SHELLS = "prime100"  # a test that lets the model use the shell; hello lets it save only
SANDBOX = confinement("auto")


@pytest.fixture
def suite(gptme_python: str) -> Suite:
    return Suite(("hello",), "markdown", 60, 3, Path(gptme_python).with_name("gptme-eval"), None)


@pytest.fixture
def answering() -> Iterator[Any]:
    """Starts an OpenAI-compatible server that gives the same answers to whoever asks; its address."""
    servers = []

    def start(*answers: str) -> str:
        left = list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                text = left.pop(0) if len(left) > 1 else left[0]
                chunks = [
                    {"delta": {"content": text}, "index": 0, "finish_reason": None},
                    {"delta": {}, "index": 0, "finish_reason": "stop"},
                ]
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                for chunk in chunks:
                    event = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [chunk]}
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.write(b"data: [DONE]\n\n")

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ran(folder: Path) -> str:
    """What gptme wrote down of the conversation, the results of its tools too."""
    (log,) = folder.rglob("conversation.jsonl")
    return "\n".join(json.loads(line)["content"] for line in log.read_text().splitlines())


def test_a_model_that_does_the_task_passes(suite: Suite, answering: Any, tmp_path: Path) -> None:
    lines: list[str] = []
    found = run_suite(suite, answering(HELLO, "Done."), "none", "m", tmp_path / "run", lines.append)
    assert found == {"hello": "pass"} and lines
    assert list((tmp_path / "run" / "home" / ".local" / "share" / "gptme" / "logs").glob("*gptme-evals*"))


@pytest.mark.skipif(not SANDBOX, reason="no bwrap and no sandbox-exec on this machine")
def test_what_the_model_runs_sees_and_changes_nothing_of_this_person(
    suite: Suite, answering: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    person = tmp_path / "person"
    person.mkdir()
    (person / "diary").write_text("of a person")
    monkeypatch.setenv("HOME", str(person))
    monkeypatch.setenv("ANTHROPIC_API_KEY", "a key of this person")
    call = f"```shell\ntouch {person}/escaped /usr/escaped; echo x > stays-here; ls {person}; env\n```"
    within = replace(suite, names=(SHELLS,), sandbox=SANDBOX)
    found = run_suite(within, answering(call, "Done."), "none", "m", tmp_path / "run", lambda line: None)
    said = ran(tmp_path / "run")
    assert found == {SHELLS: "fail"} and "GPTME_MAX_STEPS=3" in said  # it ran
    assert [path.name for path in person.iterdir()] == ["diary"] and not Path("/usr/escaped").exists()
    assert "diary" not in said and "a key of this person" not in said
    assert list((tmp_path / "run").rglob("stays-here"))


@pytest.mark.skipif(SANDBOX != "bwrap", reason="no bwrap on this machine")
@pytest.mark.parametrize("first", ["#!/bin/sh", "#!{person}/python"])  # of /, and of the home itself
def test_a_program_of_any_shell_does_not_show_the_home_again(first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    person, program = tmp_path / "person", tmp_path / "person" / "bin" / "gptme-eval"
    program.parent.mkdir(parents=True)
    (person / "diary").write_text("of a person")
    shutil.copy("/bin/sh", person / "bin" / "python")
    program.write_text(f"{first.format(person=person / 'bin')}\necho began\ncat {person}/diary\n")
    program.chmod(0o755)
    monkeypatch.setenv("HOME", str(person))
    with pytest.raises(UserError, match="no results"):
        run_suite(Suite(("x",), "markdown", 1, 1, program, SANDBOX), "", "", "m", tmp_path / "run", lambda line: None)
    said = (tmp_path / "run" / "output.txt").read_text()
    assert said.startswith("began") and "of a person" not in said


def test_what_a_program_leaves_running_is_not_waited_for(tmp_path: Path) -> None:
    program = tmp_path / "gptme-eval"
    program.write_text("#!/bin/sh\nsleep 98 &\necho 1\necho 2\n")
    program.chmod(0o755)
    began, lines = time.monotonic(), []
    with pytest.raises(UserError, match="exit status 0"):
        run_suite(Suite(("x",), "markdown", 1, 1, program, None), "", "", "m", tmp_path / "run", lines.append)
    assert time.monotonic() - began < 30 and lines == ["1", "2"]
    assert "sleep 98" not in subprocess.run(["ps", "ax"], capture_output=True, text=True, check=True).stdout


def test_base_and_tuned_stand_side_by_side(tmp_path: Path) -> None:
    suite = Suite(("a", "b"), "markdown", 60, 3, tmp_path, None)
    found = side_by_side(suite, {"a": "fail", "b": "pass"}, {"a": "pass", "b": "timeout", "c": "pass"})
    assert (found["suite"], found["tests"], found["base"], found["tuned"]) == ("a b", 3, {"passed": 1}, {"passed": 2})
    assert found["rows"][2] == {"test": "c", "base": "not run", "tuned": "pass"}


@pytest.mark.long
def test_a_test_that_takes_too_long_ends_with_what_it_started(suite: Suite, answering: Any, tmp_path: Path) -> None:
    short = replace(suite, names=(SHELLS,), seconds=15)
    found = run_suite(short, answering("```shell\ntouch began\nsleep 4321\n```"), "none", "m", tmp_path / "run", lambda line: None)
    assert found == {SHELLS: "timeout"}
    assert list((tmp_path / "run").rglob("began"))
    assert "sleep 4321" not in subprocess.run(["ps", "ax"], capture_output=True, text=True, check=True).stdout


def test_a_suite_that_is_not_listed_is_refused_with_the_nearest(suite: Suite, tmp_path: Path) -> None:
    check_names(Suite(("basic", "hello-patch", "all-practical"), "markdown", 1, 1, suite.program, None), tmp_path)
    with pytest.raises(UserError, match="no such suite") as error:
        check_names(Suite(("hello-pach",), "markdown", 1, 1, suite.program, None), tmp_path)
    assert error.value.hint == "did you mean hello-patch?"


def test_a_program_that_ends_without_results_is_one_line(tmp_path: Path) -> None:
    program = tmp_path / "gptme-eval"
    program.write_text(f"#!{sys.executable}\nprint('broken')\n")
    program.chmod(0o755)
    with pytest.raises(UserError, match="no results") as error:
        run_suite(Suite(("x",), "markdown", 1, 1, program, None), "", "", "m", tmp_path / "run", lambda line: None)
    assert (tmp_path / "run" / "output.txt").read_text() == "broken\n" and "output.txt" in error.value.hint


def test_a_program_that_cannot_be_started_is_one_line(tmp_path: Path) -> None:
    program = tmp_path / "gptme-eval"
    program.write_text("no program")
    program.chmod(0o755)
    with pytest.raises(UserError, match=r"--list: .*Exec format error"):
        check_names(Suite(("x",), "markdown", 1, 1, program, None), tmp_path)


def test_the_program_is_the_one_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such program"):
        find_program(str(tmp_path / "gone"))
    program = tmp_path / "gptme-eval"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert find_program(str(program)) == program
    if not Path(sys.executable).with_name("gptme-eval").exists():
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        assert find_program("") == program


def test_every_status_of_gptme_eval_is_told_apart() -> None:
    rows = [{"name": name, "status": status, "passed": passed} for name, status, passed in (
        ("a", "success", True), ("b", "success", False), ("c", "timeout", False), ("d", "error", False))]  # fmt: skip
    assert outcomes({"models": [{"results": rows}]}) == {"a": "pass", "b": "fail", "c": "timeout", "d": "error"}


def test_a_sandbox_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert confinement("none") is None
    with pytest.raises(UserError, match="not one of"):
        confinement("jail")
    other = next(tool for system, tool in TOOLS.items() if system != sys.platform)
    with pytest.raises(UserError, match="not there on this machine"):
        confinement(other)
    monkeypatch.setenv("PATH", "")
    assert confinement("auto") is None


def test_the_profile_of_macos_quotes_what_folders_are_called(tmp_path: Path) -> None:
    folder = tmp_path / 'a "quoted" name'
    command = confined("sandbox-exec", ["true"], [folder], tmp_path, [])
    assert command[0] == "sandbox-exec" and command[-1] == "true" and 'a \\"quoted\\" name' in command[2]


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    make_base(root, changes={"max_position_embeddings": 16384})
    return make_run(root, "torch", sample_prompts=0)


def test_nothing_is_executed_before_a_person_agreed(cli: Any, a_run: Path, gptme_python: str) -> None:
    program = Path(gptme_python).with_name("gptme-eval")
    status, _, err = cli("evaluate", a_run, "--gptme-eval", "hello", "--gptme", program, "--generate", 0)
    assert status == 2 and "EXECUTES" in err and "add --yes" in err
    assert not (a_run / "evaluation.json").exists() and not (a_run / "gptme-eval").exists()


def test_what_cannot_be_run_is_refused_before_anything_is_measured(cli: Any, a_run: Path, gptme_python: str) -> None:
    program = Path(gptme_python).with_name("gptme-eval")
    for told, said in (
        (("--gptme-eval", "hello", "--gptme", "/nowhere/gptme-eval"), "no such program"),
        (("--gptme-eval", "hello", "--gptme", program, "--sandbox", "jail"), "not one of auto"),
        (("--gptme-eval", "hello", "--gptme", program, "--tool-format", "yaml"), "not one of markdown"),
        (("--gptme-eval", "helo", "--gptme", program, "--yes"), "did you mean hello?"),
        (("--gptme-eval", "hello", "--data", "d"), "leave --data out"),
        (("--steps", 3), "--steps is of gptme-eval"),
        (("--tool-format", "xml"), "--tool-format is of gptme-eval"),
    ):
        status, _, err = cli("evaluate", a_run, *told)
        assert status == 2 and said in err and not (a_run / "evaluation.json").exists()


@pytest.mark.long
def test_base_and_tuned_model_of_a_run_are_put_through_a_suite(cli: Any, a_run: Path, gptme_python: str) -> None:
    program = Path(gptme_python).with_name("gptme-eval")
    limits = ("--seconds", 90, "--steps", 1, "--generate", 0)
    status, out, err = cli("evaluate", a_run, "--gptme-eval", "hello", "--gptme", program, "--yes", *limits, "--json")
    assert status == 0, err
    found = json.loads(out)["gptme_eval"]
    assert found["tests"] == 1 and [row["test"] for row in found["rows"]] == ["hello"]
    assert found == json.loads((a_run / "evaluation.json").read_text())["gptme_eval"]
    assert len(list((a_run / "gptme-eval").rglob("conversation.jsonl"))) == 2  # of base and tuned
    cli("evaluate", a_run, "--generate", 0)
    assert json.loads((a_run / "evaluation.json").read_text())["gptme_eval"] == found  # measuring the losses again loses nothing
