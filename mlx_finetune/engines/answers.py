"""What engines share when they answer: what was read before, and which prompts are read together. Neutral."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Choose = Callable[[np.ndarray], int]  # logits, float32 [V] -> the next token
Advance = Callable[[int, int], None]  # prompts answered, of how many
PREFILL = 2048  # tokens of a prompt that are read at once
MOST_TOGETHER, MOST_TOKENS = 16, 16384  # prompts that are answered together, and tokens of them with their answers


@dataclass
class Kept:
    """What a model has read and written, so that it need not be read again; of no use once what is trained has changed."""

    tokens: list[int] = field(default_factory=list)  # those that `state` holds
    state: Any = None  # keys and values, as the engine has them


One = Callable[[list[int], Kept], Iterable[int]]
Several = Callable[[list[list[int]], Callable[[], None]], list[list[int]]]


def in_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(first), len(second))
    differ = np.flatnonzero(np.asarray(first[:shorter]) != np.asarray(second[:shorter]))
    return int(differ[0]) if len(differ) else shorter


def together(prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
    """Which prompts are answered together, as indices: those that begin alike, so that it is read once for all of a group."""
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(prompts)), key=lambda i: list(prompts[i])):
        longest = max(longest, len(prompts[index]))
        full = groups and (len(groups[-1]) == MOST_TOGETHER or (len(groups[-1]) + 1) * (longest + limit) > MOST_TOKENS)
        if not groups or full:
            groups.append([])
            longest = len(prompts[index])
        groups[-1].append(index)
    return groups


def shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all begin with, so that each has one more at least."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    return min(in_common(first, last), *(len(prompt) - 1 for prompt in prompts))


def answered(
    prompts: Sequence[Sequence[int]], limit: int, one: One, several: Several | None, advance: Advance | None
) -> list[list[int]]:
    """See `Engine.generate_all`; by `several` where the model can, else by `one` after the other."""
    known = [list(map(int, prompt)) for prompt in prompts]
    written: list[list[int]] = [[] for _ in known]
    done = 0

    def said() -> None:
        nonlocal done
        done += 1
        if advance:
            advance(done, len(known))

    kept = Kept()
    for group in together(known, limit):
        if several:
            found = several([known[i] for i in group], said)
        else:
            found = [list(one(known[i], kept)) for i in group]
            for _ in group:
                said()
        for index, answer in zip(group, found, strict=True):
            written[index] = answer
    return written
