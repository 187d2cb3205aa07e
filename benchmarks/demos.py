"""What the demo gives on each engine, side by side, after `scripts/demo` and `scripts/demo --engine torch`:

    .venv/bin/python benchmarks/demos.py demo/mlx/demo.json demo/torch/demo.json [--out benchmarks/results/demos.json]

Exit status 1 where the held-out loss falls by less than 0.15 nats, or the engines end more than 0.01 apart.
"""

import argparse
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

LEAST_FALL, MOST_APART = 0.15, 0.01
PACKAGES = ("mlx", "mlx-lm", "torch", "transformers", "peft", "numpy")


def main() -> None:
    """Prints the figures and judges them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs=2)
    parser.add_argument("--out", type=Path, help="also write them as JSON, with the machine")
    arguments = parser.parse_args()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.results]
    figures = {result["engine"]: {name: value for name, value in result.items() if name != "answers"} for result in results}
    falls = {result["engine"]: result["held_out_loss_base"] - result["held_out_loss_tuned"] for result in results}
    apart = abs(results[0]["held_out_loss_tuned"] - results[1]["held_out_loss_tuned"])
    for engine, fall in falls.items():
        print(f"{engine}: held-out loss falls by {fall:.4f} nats (at least {LEAST_FALL})")
    print(f"final held-out losses differ by {apart:.1e} (at most {MOST_APART})")
    if arguments.out:
        machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
        versions = {package: version(package) for package in PACKAGES}
        report = {"machine": machine, "versions": versions, "falls": falls, "apart": apart, "demos": figures}
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if min(falls.values()) >= LEAST_FALL and apart <= MOST_APART else 1)


if __name__ == "__main__":
    main()
