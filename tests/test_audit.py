"""scripts/audit says what is known of the installed versions, and never that all is well where nothing was asked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "audit.py"
CLEAN = {"name": "jinja2", "version": "3.1.6", "vulns": []}
WEAK = {"name": "h11", "version": "0.14.0", "vulns": [{"id": "PYSEC-2025-1", "fix_versions": ["0.16.0"], "aliases": []}]}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0)"}


@pytest.mark.parametrize(
    ("answer", "arguments", "status", "words"),
    [
        ([CLEAN], (), 0, "no known weakness"),
        ([CLEAN, WEAK], (), 1, "h11 0.14.0: PYSEC-2025-1, mended in 0.16.0"),
        ([WEAK, SKIPPED], ("--if-reached",), 1, "1 of 2 packages"),
        ([CLEAN, SKIPPED], (), 3, "not audited"),
        ([SKIPPED], ("--if-reached",), 0, "not audited"),
        ([], (), 3, "not audited"),
        (None, (), 3, "no answer"),
    ],
)
def test_what_is_not_known_is_not_called_clean(
    answer: object, arguments: tuple[str, ...], status: int, words: str, tmp_path: Path
) -> None:
    """In pip-audit's place stands a program that answers as it does; None: it fails."""
    program = tmp_path / "pip-audit"
    said = f"import json\nprint(json.dumps({{'dependencies': {answer!r}}}))" if answer is not None else "raise SystemExit(1)"
    program.write_text(f"#!{sys.executable}\n{said}\n")
    program.chmod(0o755)
    done = subprocess.run([sys.executable, SCRIPT, program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == status and words in done.stdout + done.stderr
    assert ("no known weakness" in done.stdout) == (status == 0 and not json.dumps(answer).count("skip_reason"))
