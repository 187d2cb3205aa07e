"""`mlx-finetune doctor`, from its options to the table and the exit status."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import typer

from mlx_finetune.errors import UserError
from mlx_finetune.planning.doctor import engines, machine, model, software
from mlx_finetune.planning.doctor.findings import Finding
from mlx_finetune.terminal import checklist, finish, say

NVIDIA = Path("/dev/nvidia0")


def doctor_command(model_name: str, as_json: bool) -> None:
    """Raises Exit(1) where something will fail."""
    if model_name:
        model.folder_here(model_name)  # a mistake in the name is said at once
    say("looking at this machine: nothing is changed, and no network is used")
    findings = list(all_findings(model_name))
    bad = [finding for finding in findings if finding.state == "fails"]
    result = {"fails": len(bad), "findings": [asdict(finding) for finding in findings]}
    following = "" if bad else f"mlx-finetune init{f' --model {model_name}' if model_name else ''}"
    finish(result, as_json, lambda: show(findings), None, following)
    if bad:
        raise typer.Exit(1)


def all_findings(model_name: str) -> Iterator[Finding]:
    """In the order in which they are shown."""
    has_nvidia = NVIDIA.exists()
    yield from machine.machine_findings()
    yield from software.software_findings(has_nvidia)
    say("trying the engines, which may take half a minute")
    yield from engines.all_findings()
    if model_name:
        say(f"asking the chat template of {model_name}")
        yield from model.model_findings(model_name, _engine())


def _engine() -> str:
    try:
        return engines.engine_that_auto_takes()
    except UserError:
        return "mlx"


def show(findings: Sequence[Finding]) -> None:
    """One line each, below it what to do, and at the end what it comes to."""
    checklist([(finding.state, finding.what, finding.found, finding.advice) for finding in findings])
    counts = Counter(finding.state for finding in findings)
    bad = ", ".join(dict.fromkeys(finding.what for finding in findings if finding.state == "fails"))
    noted = f"; {counts['note']} to note" if counts["note"] else ""
    print((f"{counts['fails']} will fail: {bad}" if bad else "nothing will fail") + noted)
