"""Attention along the segments of a tree, through transformers' own register of attention functions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mlx_finetune.data.trees import Segment, Tree
from mlx_finetune.models.mlx_proven import PROVEN

NAME = "mlx_finetune_tree"
Masks = dict[tuple[int, int, int | None], torch.Tensor]  # by segment and window
_trees: list[tuple[Tree, Masks]] = []  # of the tree that is computed now, forward or backward: made once for all its layers


def takes_trees(model: PreTrainedModel) -> bool:
    """Whether its attention can follow a tree: no soft cap of the scores, which the fused functions do not have."""
    config = model.config
    one = PROVEN.get(config.model_type)
    known = one is not None and not one.own_attention and model._supports_attention_backend
    return known and not getattr(config, "attn_logit_softcapping", None)


@contextmanager
def along(model: PreTrainedModel, tree: Tree | None) -> Iterator[None]:
    """Inside, forward and backward, the model attends along `tree`; None: as it does by itself."""
    if tree is None:
        yield
        return
    own = model.config._attn_implementation
    _trees.append((tree, {}))
    model.config._attn_implementation = NAME  # transformers makes no mask for a name that is not its own
    try:
        yield
    finally:
        model.config._attn_implementation = own
        _trees.pop()


@torch.compiler.disable
def attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, dropout: float = 0.0, **others: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """[1, H, T, D] of queries, [1, KV, T, D] of keys and values -> [1, T, H, D]; each segment over its ancestors and itself."""
    assert attention_mask is None and not dropout and others.get("softcap") is None and others.get("s_aux") is None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    (tree, masks), parts = _trees[-1], []
    for segment in tree.segments:
        ranges = _joined([*segment.sees, (segment.start, segment.end)])
        keys, values = (torch.cat([x[:, :, low:high] for low, high in ranges], 2) for x in (key, value))
        where = segment.start, segment.end, others.get("sliding_window")
        if where not in masks and (made := _mask(tree, segment, ranges, where[2])) is not None:
            masks[where] = made.to(query.device)
        how = {"attn_mask": masks[where]} if where in masks else {"is_causal": True}
        one = query[:, :, segment.start : segment.end]
        parts.append(F.scaled_dot_product_attention(one, keys, values, scale=scaling, **how))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def _mask(tree: Tree, segment: Segment, ranges: list[tuple[int, int]], window: int | None) -> torch.Tensor | None:
    """bool [queries, keys], by how far they stand apart in their row; None where each query sees all before it in the segment."""
    where = tree.positions
    queries = where[segment.start : segment.end]
    keys = np.concatenate([where[low:high] for low, high in ranges])
    if len(keys) == len(queries) and not (window and len(keys) > window):
        return None
    apart = queries[:, None] - keys[None]
    return torch.from_numpy((apart >= 0) & (apart < window) if window else apart >= 0)


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined = ranges[:1]
    for low, high in ranges[1:]:
        if joined[-1][1] == low:
            joined[-1] = joined[-1][0], high
        else:
            joined.append((low, high))
    return joined


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
