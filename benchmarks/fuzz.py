"""Fuzzes every reader of files: files like genuine ones, but damaged, led by what of the readers' code they reach (atheris).

    .venv/bin/python benchmarks/fuzz.py [NAME ...] [--seconds N] [--write]

NAME: readers of tests/hostile_readers.py and tests/hostile_model_readers.py; without names all of them. A reader may give a value
that makes sense or a UserError of one line; anything else, 10 s for one file, or 2 GB of memory ends it with the file that did it,
in a folder beside the corpus. --write puts the figures into results/fuzz.md and fuzz.json. Exit status 1 where something was found.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
CORPUS = Path(tempfile.gettempdir()) / "mlx-finetune-fuzz"
RESULTS = HERE / "results"
SECONDS_A_FILE, MEGABYTES, LONGEST = 10, 2048, 1 << 16
SEEDS = 40  # damaged files that the corpus begins with
INSTRUMENTED = ["mlx_finetune"]
DONE = re.compile(r"Done (\d+) runs in (\d+) second")
LAST = re.compile(r"#(\d+)\s")


def readers() -> Mapping[str, Any]:
    """By name."""
    import hostile_model_readers
    import hostile_readers

    return hostile_readers.READERS | hostile_model_readers.READERS


def fuzz_here(name: str, seconds: int) -> None:
    """In this process, which libFuzzer ends."""
    import atheris
    from hostile import damaged

    os.environ["OMP_NUM_THREADS"] = "1"
    with atheris.instrument_imports(include=INSTRUMENTED):
        import hostile_readers

        reader = hostile_readers.READERS.get(name) or readers()[name]  # the others import torch and transformers
    folder, corpus = CORPUS / _plain(name) / "folder", CORPUS / _plain(name) / "corpus"
    genuine = hostile_readers.fresh(reader, folder)
    corpus.mkdir(exist_ok=True)
    (corpus / "genuine").write_bytes(genuine)
    for seed in range(SEEDS):
        (corpus / f"seed-{seed}").write_bytes(damaged(genuine, seed)[:LONGEST])

    def mutate(data: bytes, size: int, seed: int) -> bytes:
        """Half of the files by what JSON and our formats are, half by bits."""
        own = Random(seed).random() < 0.5
        made: bytes = damaged(data, seed) if own else atheris.Mutate(data, size)
        return made[:size]

    def too_long(number: int, frame: object) -> None:
        raise AssertionError(f"{SECONDS_A_FILE} s for one file")

    def one(data: bytes) -> None:
        before = signal.signal(signal.SIGALRM, too_long)
        signal.setitimer(signal.ITIMER_REAL, SECONDS_A_FILE)
        try:
            reader.check(folder, data)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    found = CORPUS / _plain(name) / "found-"
    limits = [f"-max_total_time={seconds}", "-timeout=0", f"-rss_limit_mb={MEGABYTES}", f"-max_len={LONGEST}"]
    options = [sys.argv[0], *limits, f"-artifact_prefix={found}", "-print_final_stats=1", str(corpus)]
    atheris.Setup(options, one, custom_mutator=mutate)
    atheris.Fuzz()


def fuzz(name: str, seconds: int) -> dict[str, Any]:
    """In a process of its own: how many files, and what was found."""
    began = time.monotonic()
    ran = subprocess.run(
        [sys.executable, __file__, name, "--seconds", str(seconds), "--here"],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    text = ran.stdout + ran.stderr
    done = DONE.search(text)
    executions = int(done[1]) if done else max((int(each) for each in LAST.findall(text)), default=0)
    found = sorted(path.name for path in (CORPUS / _plain(name)).glob("found-*"))
    (CORPUS / _plain(name) / "log.txt").write_text(text)
    row = {"reader": name, "executions": executions, "seconds": round(time.monotonic() - began), "found": found}
    return row | ({} if ran.returncode == 0 or found else {"found": [f"exit status {ran.returncode}"]})


def _plain(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def write(rows: list[dict[str, Any]]) -> None:
    """Adds to what stands there: the newest figures of each reader."""
    place, where = RESULTS / "fuzz.json", _machine()
    before = [] if not place.is_file() else json.loads(place.read_text())["readers"]
    every = {row["reader"]: row for row in [*before, *rows]}
    place.write_text(json.dumps({"machine": where, "readers": list(every.values())}, indent=1) + "\n")
    lines = ["# Readers under damaged files", "", f"`benchmarks/fuzz.py`, atheris {version('atheris')}, {where}.", ""]
    lines += [f"At most {SECONDS_A_FILE} s and {MEGABYTES // 1024} GB for a file, which begins as a genuine one of its kind.", ""]
    lines += ["| reader | files read | seconds | found |", "|---|---:|---:|---|"]
    for row in every.values():
        lines.append(f"| {row['reader']} | {row['executions']:,} | {row['seconds']:,} | {', '.join(row['found']) or 'nothing'} |")
    total = sum(row["executions"] for row in every.values()), sum(row["seconds"] for row in every.values())
    lines += [f"| **all** | {total[0]:,} | {total[1]:,} | {sum(len(row['found']) for row in every.values()) or 'nothing'} |", ""]
    (RESULTS / "fuzz.md").write_text("\n".join(lines))


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def main() -> int:
    """Fuzzes one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seconds", type=int, default=60, help="of each reader")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print("error: atheris is not installed\nhint: pip install atheris (Linux, Python 3.11 or newer)", file=sys.stderr)
        return 2
    if asked.here:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        fuzz_here(asked.names[0], asked.seconds)
    known = list(readers())
    for name in asked.names:
        if name not in known:
            print(f"error: no reader {name!r}\nhint: known are {', '.join(known)}", file=sys.stderr)
            return 2
    rows = []
    for name in asked.names or known:
        rows.append(fuzz(name, asked.seconds))
        print(json.dumps(rows[-1]), flush=True)
        if asked.write:
            write(rows)
    return int(any(row["found"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
