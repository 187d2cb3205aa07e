"""`evaluate --gptme-eval`: gptme's own tests with base and tuned model, each served by us in turn."""

import re
import secrets
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer

from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.confined import HINTS, confinement
from mlx_finetune.evaluation.gptme_eval import Suite, check_names, find_program, run_suite, side_by_side
from mlx_finetune.files import read_json, write_json
from mlx_finetune.serving.command import check_installed
from mlx_finetune.serving.defaults import MAX_TOKENS
from mlx_finetune.serving.listening import in_background
from mlx_finetune.serving.opened import Opened, Source, find_source
from mlx_finetune.serving.served import OF_BASE, Served
from mlx_finetune.terminal import progress, say, table

FOLDER = "gptme-eval"  # in a run: what gptme wrote and did, one folder for each time
DONE = re.compile(r"\| (\d+)/(\d+) \[")
FORMATS = ("markdown", "xml", "tool")


@dataclass(frozen=True)
class GptmeOptions:
    """What is asked for on the command line."""

    suites: tuple[str, ...]
    program: str
    tool_format: str  # empty: that of the run
    sandbox: str
    seconds: int
    steps: int
    yes: bool


@dataclass(frozen=True)
class GptmePlan:
    """Checked and agreed to, before anything is measured."""

    source: Source
    suite: Suite
    folder: Path


def plan_gptme_eval(run: Path, checkpoint: str, engine: str, options: GptmeOptions) -> GptmePlan:
    """Asks the person, unless that was said beforehand, and makes the folder.

    Raises:
        UserError: a program, a package or a sandbox is not there, there is no such suite, or nobody agreed.
    """
    check_installed()
    source = find_source(str(run), checkpoint, engine)
    told = options.tool_format or source.trained.tool_format or "markdown"
    if told not in FORMATS:
        raise UserError(f"--tool-format {told}: not one of {', '.join(FORMATS)}", hint="leave it out for that of the run")
    suite = Suite(options.suites, told, options.seconds, options.steps, find_program(options.program), confinement(options.sandbox))
    _agree(suite, options.yes)
    with TemporaryDirectory() as scratch:
        check_names(suite, Path(scratch))
    folder = run / FOLDER / f"{datetime.now():%Y-%m-%dT%H-%M-%S}"
    folder.mkdir(parents=True)
    return GptmePlan(source, suite, folder)


def _agree(suite: Suite, yes: bool) -> None:
    if suite.sandbox:
        within = f"{suite.sandbox} lets it write into a folder of the run and one for temporary files alone, hides your home"
        within += " and leaves it the network" if suite.sandbox == "bwrap" else " and leaves it no network but this machine's"
    else:
        how = HINTS.get(sys.platform, "no sandbox is known here")
        within = f"NOTHING confines it: it may do on this machine whatever you may ({how})"
    say(f"gptme-eval {' '.join(suite.names)}: gptme EXECUTES the commands that the models write, without asking. {within}")
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError("--gptme-eval executes what the models write", hint="add --yes where that is wanted")
    if not typer.confirm("Go on?", err=True):
        raise UserError("nothing was executed", hint="--sandbox names what confines it")


def measure_gptme_eval(plan: GptmePlan) -> dict[str, Any]:
    """Base and tuned model through the suite; the outcome stands in evaluation.json too, which is there already."""
    source, suite = plan.source, plan.suite
    assert source.run is not None
    name = source.named()
    served, key = Served(source, name, MAX_TOKENS), secrets.token_hex(16)
    found = {}
    with in_background(served, lambda: Opened(source), key) as url:
        for which, model in (("base", name + OF_BASE), ("tuned", name)):
            say(f"gptme-eval {' '.join(suite.names)} with {model} -> {plan.folder / which}")
            with progress(which) as advance:

                def said(line: str) -> None:
                    if done := DONE.search(line):
                        advance(int(done[1]), int(done[2]))

                found[which] = run_suite(suite, f"{url}/v1", key, model, plan.folder / which, said)
    result = side_by_side(suite, found["base"], found["tuned"])
    path = source.run / "evaluation.json"
    write_json(path, read_json(path) | {"gptme_eval": result})
    return result


def show_gptme_eval(result: dict[str, Any]) -> None:
    """The tests side by side, and how many passed."""
    passed = {which: f"{result[which]['passed']} of {result['tests']}" for which in ("base", "tuned")}
    rows = [(row["test"], row["base"], row["tuned"]) for row in (*result["rows"], {"test": "passed", **passed})]
    limits = f"{result['seconds']} s and {result['steps']} answers a test"
    table(f"gptme-eval {result['suite']}, {result['format']}, at most {limits}", rows, ("", "base", "tuned"))
