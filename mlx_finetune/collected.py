"""A collection as a person looks at it: tables of what became of everything, and a few conversations."""

import json
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from mlx_finetune.data.scan import Hit
from mlx_finetune.data.sources import BadLine
from mlx_finetune.terminal import one_line, printable, table

CHARACTERS_A_TOKEN = 3.3  # 3.33 in 22 genuine logs and 14 trees with SmolLM2's tokenizer; 2.9 in what assistants write
ROLES = ("system", "user", "assistant", "tool")
SHOWN = 5
SERVED = 2  # sets of options that are shown
ROWS = 20  # of a table of counts
WIDTH = 100


def show_collection(summary: Mapping[str, Any]) -> None:
    """Found, kept and why not; learned and why not; tokens; secrets."""
    rows, tokens = [], []
    for source, kept in summary["conversations"].items():
        found, characters = summary["found"].get(source, 0), summary["characters"].get(source, {})
        rows.append((source, f"{found:,}", f"{kept:,}", f"{found - kept:,}", f"{summary['assistant_turns'][source]:,}"))
        tokens.append((source, *(f"{round(characters.get(role, 0) / CHARACTERS_A_TOKEN):,}" for role in ROLES)))
    table("collected", rows, ("source", "found", "kept", "rejected", "turns learned"))
    table("tokens*", tokens, ("source", *ROLES))
    print(f"* about: at {CHARACTERS_A_TOKEN} characters a token; prepare counts with the model's tokenizer\n")
    _counts("rejected, by reason", summary["rejected"])
    _counts("turns that are only read, by reason", summary["context_only"])
    if summary["recoveries"]:
        print(f"turns that recover from an error: {summary['recoveries']:,}")
    _counts("formats", summary["formats"])
    _counts("system prompts", summary["system_prompts"])
    if summary["secrets"]:
        distinct = summary["distinct_secrets"]
        secrets = [(kind, f"{count:,}", f"{distinct.get(kind, 0):,}") for kind, count in summary["secrets"].items()]
        table("secrets replaced, by kind", secrets, ("kind", "places", "different"))
        print("no rule finds every secret: look at what you share\n")
    for options, count in list(summary["served_by"].items())[:SERVED]:
        print(f"{count:,} system prompts are what this serves: gptme {printable(options)}")
    if len(summary["served_by"]) > SERVED:
        print(f"and {len(summary['served_by']) - SERVED} other sets of options serve the others: see served_by in collect.json")
    for bad in summary["bad_lines"][:SHOWN]:
        print(f"skipped: {printable(bad['file'])}:{bad['line']}: {printable(bad['reason'])}")
    if summary["bad_line_count"] > SHOWN:
        print(f"skipped: {summary['bad_line_count'] - SHOWN:,} more lines; the first hundred stand in collect.json")


def _counts(title: str, counts: Mapping[str, int]) -> None:
    if counts:
        rows = [(one_line(name, WIDTH), f"{count:,}") for name, count in counts.items()]
        if len(rows) > ROWS + 1:
            rest = sum(list(counts.values())[ROWS:])
            rows[ROWS:] = [(f"and {len(rows) - ROWS} others, in collect.json", f"{rest:,}")]
        table(title, rows)


def show_hits(hits: Sequence[Hit], unread: Sequence[BadLine]) -> None:
    """Where secrets stand, a line each as compilers write it, never the secrets; and what could not be looked at."""
    for hit in hits:
        times = f" ({hit.count} times)" if hit.count > 1 else ""
        print(f"{printable(hit.file)}:{hit.line}: {hit.kind}{times}")
    for one in unread[:SHOWN]:
        print(f"not read: {printable(str(one.path))}:{one.line}: {printable(one.reason)}")
    if len(unread) > SHOWN:
        print(f"not read: {len(unread) - SHOWN:,} more")
    print(f"{sum(hit.count for hit in hits):,} secrets found; no rule finds every secret")


def show_examples(out: Path, summary: Mapping[str, Any]) -> None:
    """Five conversations that were kept and five that were not, of every source, the same ones each time for one collection."""
    random = np.random.default_rng(0)
    print("kept, for example:")
    for row in _shared([_random_lines(out / f"{source}.jsonl", random) for source in summary["conversations"]]):
        turns = [m for m in row["messages"] if m["role"] == "assistant"]
        learned = sum(m.get("weight", 1) > 0 for m in turns)
        name, title = row["meta"].get("name") or row["id"], one_line(row["meta"].get("title") or "", WIDTH)
        print(f"  {row['source']} {one_line(name, WIDTH)}{f': {title}' if title else ''}")
        print(f"    {learned} of {len(turns)} turns learned; asked: {_first(row['messages'], 'user')}")
        print(f"    answered: {_first(row['messages'], 'assistant')}")
    print("rejected, for example:")
    for row in _shared(_lines_by_source(out / "rejected.jsonl", random)):
        print(f"  {row['source']} {one_line(row['id'], WIDTH)}: {one_line(row['reason'], WIDTH)}")


def _shared(by_source: Sequence[Sequence[bytes]]) -> list[Any]:
    """Five rows in all, shared out among the sources."""
    chosen = sorted((turn, source) for source, lines in enumerate(by_source) for turn in range(len(lines)))[:SHOWN]
    return [json.loads(by_source[source][turn]) for source, turn in sorted((source, turn) for turn, source in chosen)]


def _lines_by_source(path: Path, random: np.random.Generator) -> list[list[bytes]]:
    """Up to five different lines of each source, of a file that holds short lines of all."""
    places: dict[str, array[int]] = defaultdict(lambda: array("q"))
    if not path.is_file():
        return []
    with path.open("rb") as file:
        place = 0
        for line in file:
            places[json.loads(line)["source"]].append(place)
            place += len(line)
        lines = []
        for starts in places.values():
            chosen = random.choice(len(starts), min(SHOWN, len(starts)), replace=False)
            lines.append([_line_at(file, starts[i]) for i in chosen.tolist()])
    return lines


def _line_at(file: IO[bytes], place: int) -> bytes:
    file.seek(place)
    return file.readline()


def _first(messages: Sequence[Mapping[str, Any]], role: str) -> str:
    return one_line(next((m["content"] for m in messages if m["role"] == role), ""), WIDTH)


def _random_lines(path: Path, random: np.random.Generator) -> list[bytes]:
    """Up to five different lines, without reading the whole file: those after random places in it."""
    if not path.is_file() or not (size := path.stat().st_size):
        return []
    lines: dict[int, bytes] = {}
    with path.open("rb") as file:
        for start in (0, *random.integers(0, size, 8 * SHOWN).tolist()):
            file.seek(start)
            if start:
                file.readline()
            place = file.tell()
            if place < size and place not in lines:
                lines[place] = file.readline()
    chosen = random.permutation(sorted(lines))[:SHOWN]
    return [lines[int(place)] for place in chosen]
