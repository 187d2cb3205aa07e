"""Runs docs/tutorial.md: its bash blocks in one shell, in a new folder; what it shows of their output must be what they print.

A `text` block behind a `bash` block shows lines of its output, in order, with others left out; `…` stands for anything.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MINUTES = 60  # on a machine that does much else; it takes some minutes on two cores of its own


@dataclass(frozen=True)
class Step:
    """Commands, and the lines that the page shows of what they print."""

    commands: str
    shown: tuple[str, ...]


def steps_of(page: str) -> list[Step]:
    """The page's bash blocks in order, each with the text block that follows it, if one does."""
    blocks = [(found[1], found[2]) for found in FENCE.finditer(page)]
    steps = []
    for number, (kind, content) in enumerate(blocks):
        if kind == "bash":
            following = blocks[number + 1] if number + 1 < len(blocks) else ("", "")
            lines = [line for line in following[1].splitlines() if line.strip()] if following[0] == "text" else []
            steps.append(Step(content, tuple(lines)))
    return steps


def not_printed(step: Step, output: str) -> str | None:
    """The first line that the page shows and the output does not have behind those before it."""
    lines = iter([_plain(line) for line in output.splitlines()])
    for shown in step.shown:
        parts = [re.escape(part) for part in _plain(shown).split("…")]
        pattern = re.compile(".*".join(parts))
        if not any(pattern.fullmatch(line) for line in lines):
            return shown
    return None


def execute(page: str, folder: Path) -> list[str]:
    """Runs the steps in the empty `folder`; gives what is wrong, a line each. Whatever they start is ended."""
    steps, outputs = steps_of(page), folder.parent / f"{folder.name}-outputs"
    outputs.mkdir()
    program = "set -eu -o pipefail\n" + "".join(
        f"{{\n{_free_port(step.commands)}}} > '{outputs}/{n}' 2>&1\n" for n, step in enumerate(steps)
    )
    environment = os.environ | {
        "NO_COLOR": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    shell = subprocess.Popen(["bash", "-c", program], cwd=folder, env=environment, start_new_session=True)
    try:
        status = shell.wait(60 * MINUTES)
    finally:
        with suppress(ProcessLookupError):  # all of them may have ended by themselves
            os.killpg(shell.pid, signal.SIGTERM)
    return _problems(steps, outputs, status)


def _problems(steps: list[Step], outputs: Path, status: int) -> list[str]:
    problems: list[str] = []
    for number, step in enumerate(steps):
        path = outputs / str(number)
        output = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
        if output is None:
            break
        if status and not (outputs / str(number + 1)).exists():
            return [*problems, f"{step.commands.strip()}\nended with status {status}: {output[-1500:]}"]
        if missing := not_printed(step, output):
            problems.append(f"{step.commands.strip()}\ndid not print: {missing}\nbut: {output[-1500:]}")
    return problems


def _plain(line: str) -> str:
    return " ".join(line.split())


def _free_port(commands: str) -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return re.sub(r"^PORT=\d+$", f"PORT={listener.getsockname()[1]}", commands, flags=re.MULTILINE)


def main() -> int:
    """0 where all is as the page says."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "tutorial"
        folder.mkdir()
        problems = execute(PAGE.read_text(encoding="utf-8"), folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{PAGE.name}: {len(steps_of(PAGE.read_text(encoding='utf-8')))} blocks run, {len(problems)} not as shown")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
