"""Gradient checkpointing (Chen et al. 2016): the activations inside of a layer are computed again in the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_finetune.engines.mlx.parts import Parts


class Recomputed:
    """Stands in for a layer: keeps its input alone. Only the hidden states and the adapter are differentiated."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, hidden: mx.array, *arguments: Any, **named: Any) -> Any:
        layer = self._layer
        own = layer.trainable_parameters()

        def inner(parameters: Any, hidden: mx.array) -> Any:
            layer.update(parameters)
            return layer(hidden, *arguments, **named)

        output = mx.checkpoint(inner)(own, hidden)
        layer.update(own)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


@contextmanager
def recomputed(backbone: nn.Module, parts: Parts, every: int) -> Iterator[None]:
    """Inside, each `every`-th layer that a gradient goes through is computed again; 0: none is."""
    layers = backbone[parts.layers]
    learning = [i for i, layer in enumerate(layers) if tree_flatten(layer.trainable_parameters())]
    below = (
        0
        if any(parts.embeddings in name for name, _ in tree_flatten(backbone.trainable_parameters()))
        else min(learning, default=len(layers))
    )
    again = set(range(below, len(layers))[::every]) if every else set()
    backbone[parts.layers] = [Recomputed(layer) if i in again else layer for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        backbone[parts.layers] = layers
