"""How fast `collect` reads a large history, in how much memory, and what a second run costs:

    .venv/bin/python benchmarks/collect.py [--megabytes 1000]

The history is the genuine logs of ../shared (or the embedded sample), repeated with variations: other numbers, names and words
in every message, another working directory, and one conversation in twenty a near-duplicate of another. gptme's core prompt is
the same in all logs of one version, as in a person's own history; with --vary-prompts no two prompts are equal (harder: nothing
is read twice).
The yardstick, measured in the same run, only parses every line as JSON and writes it again.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data" / "gptme-logs"
WORD = re.compile(r"\d+|[A-Za-z]{5,}")
VARIED = 0.15  # share of the numbers and longer words that differ in each copy
VOCABULARY = [
    a + b + c
    for a in ("ka", "lo", "mi", "re", "su", "ta")
    for b in ("ben", "dor", "fal", "gim", "nok")
    for c in ("al", "en", "is", "ov")
]


def varied(text: str, rng: random.Random, share: float) -> str:
    """The text with some of its words replaced."""

    def other(match: re.Match[str]) -> str:
        if rng.random() >= share:
            return match[0]
        return str(rng.randrange(10 ** min(len(match[0]), 9))) if match[0].isdigit() else rng.choice(VOCABULARY)

    return WORD.sub(other, text)


def make_history(folder: Path, size: int, vary_prompts: bool, seed: int = 0) -> int:
    """Logs of about `size` bytes; gives back the exact number of bytes of conversation.jsonl files."""
    rng = random.Random(seed)
    source = SHARED if SHARED.is_dir() else ROOT / "mlx_finetune" / "sample" / "gptme-logs"
    originals = []
    for log in sorted(source.glob("*/conversation.jsonl")):
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        if rows and "gptme-evals" not in log.parent.name:
            originals.append((log.parent, rows))
    written = copy = 0
    while written < size:
        parent, rows = originals[copy % len(originals)]
        near = rng.random() < 0.05
        target = folder / f"{2020 + copy % 6}-{copy % 12 + 1:02}-{copy % 28 + 1:02}-{parent.name[11:]}-{copy}"
        target.mkdir(parents=True)
        lines = []
        for row in rows:
            little = row.get("pinned") or near
            share = 0.0 if row.get("pinned") and not vary_prompts else 0.002 if little else VARIED
            text = varied(row["content"], rng, share)
            lines.append(json.dumps(row | {"content": text.replace("/home/dev/", f"/home/dev/w{copy}/")}))
        raw = ("\n".join(lines) + "\n").encode()
        (target / "conversation.jsonl").write_bytes(raw)
        if (parent / "config.toml").exists():
            shutil.copy(parent / "config.toml", target)
        written += len(raw)
        copy += 1
    return written


def measured(command: list[str]) -> tuple[float, int]:
    """Seconds, and the most memory of the process with its helpers (resident, bytes)."""
    start, most = time.perf_counter(), 0
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):  # a helper that has just ended
            most = max(most, sum(one.memory_info().rss for one in (process, *process.children(recursive=True))))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return time.perf_counter() - start, most


def yardstick(folder: Path, out: Path) -> float:
    """Seconds to parse every line and write it again."""
    start = time.perf_counter()
    with out.open("w", encoding="utf-8") as file:
        for log in sorted(folder.glob("*/conversation.jsonl")):
            with log.open(encoding="utf-8") as lines:
                file.writelines(json.dumps(json.loads(line), ensure_ascii=False) + "\n" for line in lines)
    return time.perf_counter() - start


def main() -> None:
    """Prints and stores the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--vary-prompts", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "collect.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_history(folder / "logs", arguments.megabytes * 10**6, arguments.vary_prompts)
        verb = [sys.executable, "-m", "mlx_finetune.cli", "collect", str(folder / "logs"), "--json"]
        result: dict[str, Any] = {
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "megabytes": round(size / 1e6),
            "every_prompt_differs": arguments.vary_prompts,
            "conversations": len(list((folder / "logs").iterdir())),
        }
        seconds = yardstick(folder / "logs", folder / "yardstick.jsonl")
        result["yardstick"] = {"megabytes_a_second": size / 1e6 / seconds}
        runs = {
            "without near-duplicates": ("plain", "--no-near-duplicate-search"),
            "with near-duplicates": ("near",),
            "a second time, nothing new": ("near",),
        }
        for title, (out, *options) in runs.items():
            seconds, memory = measured([*verb, "--out", str(folder / out), *options])
            speed = size / 1e6 / seconds
            ratio = speed / result["yardstick"]["megabytes_a_second"]
            result[title] = {
                "seconds": seconds,
                "megabytes_a_second": speed,
                "of_the_yardstick": ratio,
                "peak_memory_mb": memory / 1e6,
            }
        summary = json.loads((folder / "near" / "collect.json").read_text(encoding="utf-8"))
        result["kept"], result["rejected"] = summary["conversations"], summary["rejected"]
        result["second_run_share"] = result["a second time, nothing new"]["seconds"] / result["with near-duplicates"]["seconds"]
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
