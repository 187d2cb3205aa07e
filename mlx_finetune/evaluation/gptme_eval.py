"""gptme's own tests, gptme-eval, run on a model that is served: base and tuned side by side. Source: gptme 0.35.1, gptme/eval."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.confined import confined
from mlx_finetune.files import read_json
from mlx_finetune.nearest import did_you_mean

PROGRAM = "gptme-eval"
INSTALL = "pipx install gptme, or name the program: --gptme PATH/gptme-eval"
OUTPUT = "output.txt"  # what the program said
STATUS = {"success": "fail", "timeout": "timeout", "error": "error"}  # of a test that did not pass, by what gptme-eval calls it
PASSED = "pass"
PASSED_ON = ("PATH", "LANG", "LC_ALL", "TERM", "SSL_CERT_FILE")  # of the environment: no key, no token
LISTED = re.compile(r"^ {2}(?: {2})?([\w-]+)(?: \(\d+ tests\)| \*)?$", re.MULTILINE)
LISTED_WITHIN, GRACE, LOOK = 120, 3, 0.2  # seconds
RESULTS = "EVAL_RESULTS_DIR"


@dataclass(frozen=True)
class Suite:
    """What is asked for."""

    names: tuple[str, ...]  # of suites or tests, as gptme-eval --list has them
    tool_format: str
    seconds: int  # for one test
    steps: int  # answers of the model in one test
    program: Path
    sandbox: str | None  # as confined.py knows it


def find_program(named: str) -> Path:
    """gptme-eval: the one that is named, of this environment, or on the PATH; raises UserError where there is none."""
    beside = Path(sys.executable).with_name(PROGRAM)
    found = named or (str(beside) if beside.is_file() else shutil.which(PROGRAM))
    if not found or not os.access(found, os.X_OK) or Path(found).is_dir():
        raise UserError(f"{named or PROGRAM}: no such program", hint=INSTALL)
    return Path(found).absolute()


def run_suite(suite: Suite, url: str, key: str, model: str, folder: Path, said: Callable[[str], None]) -> dict[str, str]:
    """Outcome (pass, fail, timeout, error) of each test of the suite by the served `model`, one test after the other.

    `folder` becomes a home of its own; logs and results stay there. `said` is given each line that the program says.

    Raises:
        UserError: there is no such test, or the program ended without results.
    """
    folder = folder.absolute()
    home = folder / "home"
    home.mkdir(parents=True)
    limits = ["-p", "1", "-t", str(suite.seconds)]
    command = [str(suite.program), *suite.names, "-m", f"local/{model}@{suite.tool_format}", *limits, "--json"]
    with TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # a short path: sockets stand there
        command = confined(suite.sandbox, command, (folder, Path(scratch)), Path.home(), programs_of(suite.program))
        status = _run(command, folder, _environment(home, folder, Path(scratch), url, key, suite.steps), said)
    found = sorted((folder / "results").glob("*/eval_results.json"))
    if not found:
        raise UserError(f"{PROGRAM} {' '.join(suite.names)}: no results (exit status {status})", hint=f"see {folder / OUTPUT}")
    return outcomes(read_json(found[-1]))


def _run(command: Sequence[str], folder: Path, environment: Mapping[str, str], said: Callable[[str], None]) -> int:
    """The exit status. It is waited for, not for the end of its output: what it leaves running may hold that open."""
    with (folder / OUTPUT).open("wb") as output, (folder / OUTPUT).open(encoding="utf-8", errors="replace") as written:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        status: int | None = None
        try:
            while status is None:
                with suppress(subprocess.TimeoutExpired):
                    status = process.wait(LOOK)
                for line in written:
                    said(line.rstrip())
        finally:
            end_all(folder / "results")
            process.wait()
    return status


def outcomes(results: Mapping[str, Any]) -> dict[str, str]:
    """Of each test, from eval_results.json of one model."""
    (model,) = results["models"]
    return {str(row["name"]): PASSED if row.get("passed") else STATUS.get(str(row["status"]), "fail") for row in model["results"]}


def side_by_side(suite: Suite, base: Mapping[str, str], tuned: Mapping[str, str]) -> dict[str, Any]:
    """As evaluation.json has it."""
    tests = sorted(base.keys() | tuned.keys())
    rows = [{"test": test, "base": base.get(test, "not run"), "tuned": tuned.get(test, "not run")} for test in tests]
    passed = {which: {"passed": sum(row[which] == PASSED for row in rows)} for which in ("base", "tuned")}
    limits = {"seconds": suite.seconds, "steps": suite.steps, "sandbox": suite.sandbox or "none"}
    return {"suite": " ".join(suite.names), "format": suite.tool_format, "tests": len(tests), **limits, **passed, "rows": rows}


def check_names(suite: Suite, folder: Path) -> None:
    """Raises UserError for a name that gptme-eval does not list, or where it lists none."""
    home = folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    environment = _environment(home, folder, folder, "", "", suite.steps)
    how: dict[str, Any] = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "check": False}
    try:
        listed = subprocess.run([str(suite.program), "--list"], **how, timeout=LISTED_WITHIN).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{suite.program} --list: {error}", hint=INSTALL) from error
    known = {"all", "all-practical", *LISTED.findall(listed)}
    for name in suite.names:
        if name not in known:
            hint = did_you_mean(name, sorted(known), f"{suite.program} --list")
            raise UserError(f"--gptme-eval {name}: gptme-eval lists no such suite or test", hint=hint)


def _environment(home: Path, folder: Path, scratch: Path, url: str, key: str, steps: int) -> dict[str, str]:
    """A home of its own; no key of this person's; tokens are counted without asking the network."""
    own = {name: value for name in PASSED_ON if (value := os.environ.get(name))}
    own |= {"HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config"), "XDG_DATA_HOME": str(home / ".local" / "share")}
    own |= {"XDG_STATE_HOME": str(home / ".local" / "state"), "XDG_CACHE_HOME": str(home / ".cache")}
    own |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": key, "GPTME_TIKTOKEN_TIMEOUT": "0", "GPTME_MAX_STEPS": str(steps)}
    own |= {RESULTS: str(folder / "results"), "TMPDIR": str(scratch), "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
    for who in ("AUTHOR", "COMMITTER"):
        own |= {f"GIT_{who}_NAME": "gptme", f"GIT_{who}_EMAIL": "gptme@localhost"}
    return own


def programs_of(program: Path) -> list[Path]:
    """Folders that the program needs to be read, also where they are in a person's home."""
    shebang = program.open("rb").readline(4096).decode("utf-8", errors="replace")
    python = Path(shebang[2:].strip().split(" ")[0]) if shebang.startswith("#!/") else program
    places = {program.resolve().parent, python.parent.parent, python.resolve().parent.parent}
    return sorted(place for place in places if place.is_dir() and place != Path("/usr"))


def end_all(results: Path) -> None:
    """Ends whatever was started with this folder for results and is still there: shells of gptme's have a session of their own."""
    found = [process for process in psutil.process_iter() if _told(process).get(RESULTS) == str(results)]
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in found:
            with suppress(psutil.NoSuchProcess):
                end(process)
        _, found = psutil.wait_procs(found, timeout=GRACE)


def _told(process: psutil.Process) -> dict[str, str]:
    """Its environment; empty where it is another person's, or gone."""
    try:
        return process.environ()
    except (psutil.AccessDenied, psutil.NoSuchProcess, OSError):
        return {}
