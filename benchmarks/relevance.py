"""How well `--relevant code` finds what a person calls programming, shell or developer tools, by the labels of ../shared:

    .venv/bin/python benchmarks/relevance.py [FOLDER] [--wrong]

FOLDER holds oasst1_hub_messages_en.jsonl and relevance_labels.json (trees that are relevant, and borderline ones, which are
left out; every other English tree is irrelevant). A small sample: read it with its intervals, 95 % by Wilson. `--wrong`
prints the tree ids on which the rule and the labels differ. Exit status 1 below a precision or a recall of 0.75.
"""

import argparse
import json
import sys
from collections.abc import Collection
from dataclasses import replace
from math import sqrt
from pathlib import Path

from mlx_finetune.data.sources import gather, openassistant
from mlx_finetune.data.sources.relevance import is_relevant

FOLDER = Path(__file__).parents[2] / "shared" / "data" / "openassistant"
LEAST = 0.75


def main() -> None:
    """Prints the figures and judges them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--wrong", action="store_true")
    arguments = parser.parse_args()
    labels = json.loads((arguments.folder / "relevance_labels.json").read_text(encoding="utf-8"))
    found, of = measure(arguments.folder / "oasst1_hub_messages_en.jsonl", labels["borderline"])
    relevant = of & set(labels["relevant"])
    right = len(found & relevant)
    print(f"{len(of)} trees, {len(relevant)} of them relevant, {len(labels['borderline'])} borderline ones left out")
    figures = {"precision": (right, len(found)), "recall": (right, len(relevant))}
    for name, (part, whole) in figures.items():
        low, high = wilson(part, whole)
        print(f"{name:9} {part / whole:.2f}  ({part} of {whole}; 95 % between {low:.2f} and {high:.2f})")
    if arguments.wrong:
        print("found, but not relevant:", *sorted(found - relevant))
        print("relevant, but not found:", *sorted(relevant - found))
    sys.exit(0 if all(part / whole >= LEAST for part, whole in figures.values()) else 1)


def measure(path: Path, left_out: Collection[str]) -> tuple[set[str], set[str]]:
    """Ids of the trees that the rule finds, and of all that it was asked about."""
    english = replace(openassistant.EVERYTHING, languages=("en",))
    asked = [one for one in gather(openassistant.read(path, english)).conversations if one.name not in left_out]
    return {one.name for one in asked if is_relevant(one.messages)}, {one.name for one in asked}


def wilson(part: int, whole: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a proportion (Wilson 1927), which holds for small numbers too."""
    centre = part + z * z / 2
    spread = z * sqrt(part * (whole - part) / whole + z * z / 4)
    return (centre - spread) / (whole + z * z), (centre + spread) / (whole + z * z)


if __name__ == "__main__":
    main()
