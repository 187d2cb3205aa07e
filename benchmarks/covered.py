"""Which lines of the package the tests run, by layer, and the files of which they run least.

    .venv/bin/python -m pip install pytest-cov
    .venv/bin/python benchmarks/covered.py [--out FOLDER]

Runs what scripts/test runs, with the programs that the tests start counted in. Writes covered.md and covered.json; exit status 1
where a tenth of a layer or more is run by no test, or a test fails. Takes a quarter of an hour of two cores.
COVERED_TESTS="-n 0 tests/test_x.py" gives pytest other arguments, to try it out.
"""

import json
import os
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tables import Figures, Table, run

ROOT = Path(__file__).parents[1]
LEAST, FEW = 90, 85  # percent of lines: of a layer, and of a file that is named
# A disk on which nothing more can be written: the counting itself cannot be written either, and says so.
APART = "tests/test_crash_places.py::test_what_cannot_be_written_whole_is_named_and_leaves_nothing_half_written"
SETTINGS = """\
[run]
source = mlx_finetune
data_file = {folder}/counted
parallel = true
concurrency = multiprocessing, thread
patch = subprocess
[report]
exclude_also =
    if TYPE_CHECKING:
    \\.\\.\\.$
"""
LAYERS = """\
Lines that can be run, without those of types alone. A process that a test kills with SIGKILL takes its count along; what runs
on a GPU, on a Mac or with a package that is not installed here cannot be run by a test here. `scripts/test --all` runs more: 98 %
of all, as counted once."""
FILES = f"Fewer than {FEW} % of their lines."


def measure(folder: Path) -> Sequence[Table]:
    """Runs the tests and reads what was counted."""
    settings, counts = folder / "settings", folder / "counts.json"
    settings.write_text(SETTINGS.format(folder=folder), encoding="utf-8")
    tests = shlex.split(os.environ.get("COVERED_TESTS", "--numprocesses 2 --dist loadfile"))
    called = [sys.executable, "-m", "pytest", "--cov=mlx_finetune", f"--cov-config={settings}", f"--cov-report=json:{counts}"]
    done = subprocess.run([*called, "--deselect", APART, *tests], cwd=ROOT, check=False)
    files = {Path(name): found["summary"] for name, found in json.loads(counts.read_text())["files"].items()}
    passed = {"what": "the tests pass", "so": done.returncode == 0}
    return [
        Table("The package", LAYERS, by_layer(files), {}, ("enough",)),
        Table("Files", FILES, few(files) or [{"file": "none"}]),
        Table("The tests", "Those that were counted.", [passed], {}, ("so",)),
    ]


def by_layer(files: dict[Path, dict[str, int]]) -> list[Figures]:
    """A row a folder of the package, one for the modules beside them, and one for all."""
    layers: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for file, counted in files.items():
        for layer in (f"{file.parts[1]}/" if len(file.parts) > 2 else "verbs and command line", "all"):
            for place, count in enumerate((1, counted["num_statements"], counted["covered_lines"])):
                layers[layer][place] += count
    rows = sorted(layers.items(), key=lambda row: (row[0] == "all", row[0]))
    return [
        {
            "layer": layer,
            "files": files,
            "lines": lines,
            "run, %": percent(run, lines),
            "enough": run * 100 > LEAST * lines,
        }
        for layer, (files, lines, run) in rows
    ]


def few(files: dict[Path, dict[str, int]]) -> list[Figures]:
    """Those of which the tests run too little, the worst first."""
    rows = [(percent(counted["covered_lines"], counted["num_statements"]), file) for file, counted in files.items()]
    return [{"file": f"`{file}`", "run, %": share} for share, file in sorted(rows) if share < FEW]


def percent(part: int, whole: int) -> float:
    """Of a hundred; an empty file is whole."""
    return round(100 * part / whole, 1) if whole else 100.0


if __name__ == "__main__":
    run("covered", str(__doc__), measure)
