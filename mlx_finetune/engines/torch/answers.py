"""Answers of a model of transformers: one with what was read before kept, or several at a time."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mlx_finetune.engines.answers import PREFILL, Choose, Kept, in_common, shared
from mlx_finetune.engines.torch.lora import to_numpy

Within = Callable[[], AbstractContextManager[Any]]  # what is computed inside
Head = Callable[[torch.Tensor], torch.Tensor]  # hidden states [n, D] -> logits [n, V]


def answer(
    backbone: Any, head: Head, within: Within, device: str,
    prompt: Sequence[int], limit: int, stop: frozenset[int], choose: Choose | None, kept: Kept,
) -> Iterator[int]:  # fmt: skip
    """See `Engine.generate`."""
    tokens = list(map(int, prompt))
    _keep(kept, in_common(kept.tokens, tokens[:-1]))
    tokens = tokens[len(kept.tokens) :]
    name = "cache_params" if "cache_params" in inspect.signature(backbone.forward).parameters else "past_key_values"
    for _ in range(limit):
        while tokens:
            part, tokens = tokens[:PREFILL], tokens[PREFILL:]
            with torch.no_grad(), within():
                read = backbone(torch.tensor([part], device=device), use_cache=True, **{name: kept.state})
                logits = head(read.last_hidden_state[0, -1:])[0]
            kept.state = read[name]
            kept.tokens += part
        token = choose(to_numpy(logits)) if choose else int(logits.argmax())
        if token in stop:
            return
        yield token
        tokens = [token]


def _keep(kept: Kept, count: int) -> None:
    """Only the first `count` tokens of what was read; nothing, where the state cannot forget."""
    surplus = len(kept.tokens) - count
    if not surplus:
        return
    if _forgets(kept.state):
        kept.state.crop(-surplus)
        del kept.tokens[count:]
    else:
        kept.state, kept.tokens = None, []


def _forgets(state: Any) -> bool:
    """Whether every layer keeps the keys and values of all tokens: no window, no recurrence."""
    return isinstance(state, DynamicCache) and all(type(layer) is DynamicLayer for layer in state.layers)


@torch.no_grad()
def answers(
    backbone: Any, head: Head, limit: int, stop: frozenset[int], device: str, prompts: Sequence[list[int]], said: Callable[[], None]
) -> list[list[int]]:
    """Greedy ones to all prompts at once, what they begin with read once; `said` is called as each ends."""
    begun, count = shared(prompts), len(prompts)
    cache = DynamicCache(config=backbone.config)
    for start in range(0, begun, PREFILL):
        part = torch.tensor([prompts[0][start : min(start + PREFILL, begun)]], device=device)
        backbone(part, past_key_values=cache, use_cache=True)
    if begun:
        cache.batch_repeat_interleave(count)
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(prompt)) + prompt[begun:] for prompt in prompts]  # behind what all begin with
    seen = [[1] * begun + [0] * (longest - len(prompt)) + [1] * (len(prompt) - begun) for prompt in prompts]
    tokens, mask = torch.tensor(padded, device=device), torch.tensor(seen, device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, begun:]
    written: list[list[int]] = [[] for _ in prompts]
    going = set(range(count))
    for _ in range(limit):
        read = backbone(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        chosen = head(read.last_hidden_state[:, -1]).argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            if row in going and token not in stop:
                written[row].append(token)
            elif row in going:
                going.remove(row)
                said()
        if not going:
            break
        tokens, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(count, 1)], -1)
    for _ in going:
        said()
    return written
