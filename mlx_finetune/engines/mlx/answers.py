"""Answers of a model of mlx-lm: one with what was read before kept, or several at a time."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import KVCache, RotatingKVCache, can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from mlx_finetune.engines.answers import PREFILL, Choose, Kept, in_common, shared

Last = Callable[[mx.array, list[Any]], mx.array]  # tokens [1, T] and caches -> logits of the last [V]


def answer(
    model: nn.Module, last: Last, prompt: Sequence[int], limit: int, stop: frozenset[int], choose: Choose | None, kept: Kept
) -> Iterator[int]:
    """See `Engine.generate`."""
    tokens = list(map(int, prompt))
    _keep(model, kept, in_common(kept.tokens, tokens[:-1]))
    tokens = tokens[len(kept.tokens) :]
    for _ in range(limit):
        while tokens:
            part, tokens = tokens[:PREFILL], tokens[PREFILL:]
            logits = last(mx.array([part]), kept.state)
            mx.eval([cache.state for cache in kept.state])
            kept.tokens += part
        row = np.array(logits.astype(mx.float32))
        token = choose(row) if choose else int(np.argmax(row))
        if token in stop:
            return
        yield token
        tokens = [token]


def _keep(model: nn.Module, kept: Kept, count: int) -> None:
    """Only the first `count` tokens of what was read; nothing, where the caches cannot forget."""
    surplus = len(kept.tokens) - count
    if kept.state is None or (surplus and not can_trim_prompt_cache(kept.state)):
        kept.state, kept.tokens = make_prompt_cache(model), []
    elif surplus:
        trim_prompt_cache(kept.state, surplus)
        del kept.tokens[count:]


def takes_several(model: nn.Module) -> bool:
    """Whether its caches are plain ones, which mlx-lm puts side by side for prompts of different lengths."""
    return all(type(cache) in (KVCache, RotatingKVCache) for cache in make_prompt_cache(model))


def answers(
    model: nn.Module, limit: int, stop: frozenset[int], prompts: Sequence[list[int]], said: Callable[[], None]
) -> list[list[int]]:
    """Greedy ones to all prompts at once, what they begin with read once; `said` is called as each ends."""
    count = len(prompts)
    generator = BatchGenerator(
        model, max_tokens=limit, stop_tokens=[[token] for token in sorted(stop)], prefill_batch_size=count,
        completion_batch_size=count, prefill_step_size=PREFILL,
    )  # fmt: skip
    try:
        begun = shared(prompts)
        with mx.stream(generator.stream):
            caches = _read(model, prompts[0][:begun])
        uids = generator.insert([prompt[begun:] for prompt in prompts], caches=[deepcopy(caches) for _ in prompts])
        written: dict[int, list[int]] = {uid: [] for uid in uids}
        while responses := generator.next_generated():
            for response in responses:
                if response.finish_reason != "stop":
                    written[response.uid].append(response.token)
                if response.finish_reason:
                    said()
    finally:
        generator.close()
    return [written[uid] for uid in uids]


def _read(model: nn.Module, tokens: list[int]) -> list[Any]:
    """Caches that hold the tokens."""
    caches: list[Any] = make_prompt_cache(model)
    for start in range(0, len(tokens), PREFILL):
        model(mx.array([tokens[start : start + PREFILL]]), cache=caches)
        mx.eval([cache.state for cache in caches])
    return caches
