"""Asks pip-audit about the exact versions of both lists; it would call clean a list of which it asked nothing, this does not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LISTS = ("constraints.txt", "constraints-gptme.txt")
FOUND, NOT_REACHED = 1, 3


def ask(program: str, file: str) -> list[dict[str, Any]]:
    """What pip-audit says of each package of a list; empty where it fails, as without a network."""
    command = [program, "--requirement", file, "--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return list(json.loads(done.stdout)["dependencies"])
    except (ValueError, KeyError, TypeError):
        print(f"{file}: {(done.stderr.strip().splitlines() or ['no answer'])[-1][:200]}", file=sys.stderr)
        return []


def verdict(asked: dict[str, list[dict[str, Any]]], if_reached: bool) -> int:
    """Prints each weakness, and of how many packages nothing is known; gives back the exit status."""
    weak = 0
    for file, packages in asked.items():
        known = [each for each in packages if "skip_reason" not in each]
        for each in known:
            for one in each["vulns"]:
                weak += 1
                mended = ", ".join(one.get("fix_versions") or ()) or "no version yet"
                print(f"{file}: {each['name']} {each['version']}: {one['id']}, mended in {mended}")
        print(f"{file}: {len(known)} of {len(packages)} packages were asked about")
    unknown = [file for file, packages in asked.items() if not packages or any("skip_reason" in each for each in packages)]
    if weak:
        return FOUND
    if unknown:
        print(f"not audited: the database does not answer for {' and '.join(unknown)}; nothing is known of these", file=sys.stderr)
        return 0 if if_reached else NOT_REACHED
    print("no known weakness")
    return 0


if __name__ == "__main__":
    program, *rest = sys.argv[1:]
    root = Path(__file__).parents[1]
    sys.exit(verdict({file: ask(program, str(root / file)) for file in LISTS}, "--if-reached" in rest))
