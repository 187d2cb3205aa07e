"""How fast conversations are fingerprinted and decided on, in how much memory, and what of planted near-duplicates is found:

    .venv/bin/python benchmarks/dedupe.py [--conversations 20000]

The conversations are made up of words as frequent as in English, 60 to 800 to a conversation. Where datasketch or rensa can be
imported, their MinHash LSH (128 permutations, the same shingles) does the same in the same run. Each case has its own process.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.data.conversation import Conversation, Message
from mlx_finetune.data.dedupe import decide
from mlx_finetune.data.fingerprint import Fingerprint, fingerprint, shingles_of
from mlx_finetune.data.minhash import jaccard

THRESHOLD = 0.7
VOCABULARY = np.array([a + b + c for a in "bdfgklmnprst" for b in ("a", "e", "io", "ou", "ast") for c in ("n", "ra", "lling", "t")])
FREQUENT = 1 / np.arange(1, 1 + 40 * len(VOCABULARY))
FREQUENT /= FREQUENT.sum()
CASES = ("all different", "all near-duplicates", "all with the same first turn")


def words(random: np.random.Generator, count: int) -> np.ndarray:
    """Words of which few are frequent."""
    ranks = random.choice(len(FREQUENT), count, p=FREQUENT)
    return np.char.add(VOCABULARY[ranks % len(VOCABULARY)], np.char.mod("%d", ranks // len(VOCABULARY)))


def talk(name: str, *turns: Sequence[str] | np.ndarray) -> Conversation:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], " ".join(turn)) for i, turn in enumerate(turns))  # type: ignore[arg-type]
    return Conversation(messages, "gptme", name, "private", {"name": name, "time": f"2026-01-01T00:00:00.{name}Z"})


def edited(random: np.random.Generator, text: np.ndarray, share: float) -> np.ndarray:
    """With that share of the words replaced."""
    text = text.copy()
    places = random.choice(len(text), round(share * len(text)), replace=False)
    text[places] = words(random, len(places))
    return text


def conversations(case: str, count: int) -> list[Conversation]:
    """Those of one of `CASES`."""
    random = np.random.default_rng(0)
    question, answer = words(random, 60), words(random, 400)
    made = []
    for number in range(count):
        size = int(random.integers(30, 400))
        if case == "all different":
            turns = [words(random, size), words(random, size)]
        elif case == "all near-duplicates":
            turns = [edited(random, question, 0.01), edited(random, answer, 0.01)]
        else:
            turns = [question, answer, words(random, 30), words(random, size)]
        made.append(talk(f"{number:06}", *turns))
    return made


def decided(case: str, count: int) -> dict[str, Any]:
    """Fingerprints, and decides with all shingles read from memory."""
    many = conversations(case, count)
    size = sum(len(message.content.encode()) for one in many for message in one.messages)
    start = time.process_time()
    prints: list[Fingerprint] = [fingerprint(one) for one in many]
    printed = time.process_time() - start
    sets = [shingles_of(one) for one in many]
    before, start = peak(), time.process_time()
    decision = decide(prints, sets.__getitem__, THRESHOLD)
    return {
        "fingerprint_mb_a_second": size / 1e6 / printed,
        "decide_cpu_seconds": time.process_time() - start,
        "decide_memory_mb": peak() - before,
        "dropped": len(decision.dropped),
        "groups": len(set(decision.groups)),
    }


def peak() -> float:
    """The most memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def planted(count: int) -> list[Conversation]:
    """As many copies as originals, with 0.5 to 8 % of the words replaced; a copy is `count` places behind its original."""
    random = np.random.default_rng(1)
    texts = [(words(random, 40), words(random, int(random.integers(60, 600)))) for _ in range(count)]
    copies = [
        [edited(random, text, share) for text in pair]
        for pair, share in zip(texts, random.uniform(0.005, 0.08, count), strict=True)
    ]
    return [talk(f"{i:06}", *turns) for i, turns in enumerate([*texts, *copies])]


def by_decide(many: Sequence[Conversation]) -> set[tuple[int, int]]:
    """Pairs of a dropped one and that for which it was dropped."""
    decision = decide([fingerprint(one) for one in many], lambda i: shingles_of(many[i]), THRESHOLD)
    return {(i, int(reason.split()[2])) for i, reason in decision.dropped.items() if reason.startswith("near")}


def by_datasketch(many: Sequence[Conversation]) -> set[tuple[int, int]]:
    """Pairs that datasketch's index names; it checks none of them."""
    from datasketch import MinHash, MinHashLSH

    index, pairs = MinHashLSH(threshold=THRESHOLD, num_perm=128), set()
    for i, one in enumerate(many):
        sketch = MinHash(num_perm=128)
        sketch.update_batch([value.tobytes() for value in shingles_of(one)])
        pairs |= {(i, j) for j in index.query(sketch)}
        index.insert(i, sketch)
    return pairs


def by_rensa(many: Sequence[Conversation]) -> set[tuple[int, int]]:
    """Pairs that rensa's index names; it checks none of them."""
    from rensa import RMinHash, RMinHashLSH

    index, pairs = RMinHashLSH(threshold=THRESHOLD, num_perm=128, num_bands=32), set()
    for i, one in enumerate(many):
        sketch = RMinHash(num_perm=128, seed=0)
        sketch.update([value.tobytes().hex() for value in shingles_of(one)])
        pairs |= {(i, j) for j in index.query(sketch)}
        index.insert(i, sketch)
    return pairs


FINDERS: dict[str, Callable[[Sequence[Conversation]], set[tuple[int, int]]]] = {
    "mlx_finetune": by_decide,
    "datasketch": by_datasketch,
    "rensa": by_rensa,
}


def found(finder: str, count: int) -> dict[str, float]:
    """Recall of the planted pairs whose exact similarity reaches the threshold, and how many of those named do."""
    many = planted(count)
    sets = [shingles_of(one) for one in many]
    near = {(i, i + count) for i in range(count) if jaccard(sets[i], sets[i + count]) >= THRESHOLD}
    start = time.process_time()
    pairs = {(min(pair), max(pair)) for pair in FINDERS[finder](many)}
    seconds = time.process_time() - start
    right = sum(jaccard(sets[i], sets[j]) >= THRESHOLD for i, j in pairs)
    return {
        "planted": len(near),
        "recall": len(pairs & near) / len(near),
        "precision": right / max(len(pairs), 1),
        "cpu_seconds": seconds,
    }


def main() -> None:
    """Prints and stores the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dedupe.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "conversations": arguments.conversations,
    }
    finders = [name for name in FINDERS if importlib.util.find_spec(name)]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for case in CASES:
            result[case] = pool.apply(decided, (case, arguments.conversations))
        result["planted"] = {name: pool.apply(found, (name, arguments.conversations // 10)) for name in finders}
    for row in result["planted"].values():
        row["times_our_seconds"] = row["cpu_seconds"] / result["planted"]["mlx_finetune"]["cpu_seconds"]
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
