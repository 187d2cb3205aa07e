"""What models call their parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.nn as nn


class Parts(NamedTuple):
    """Names: of what lies below the head, and in it of the list of layers and of the embeddings."""

    backbone: str
    layers: str
    embeddings: str


LLAMA = Parts("model", "layers", "embed_tokens")
KNOWN = (LLAMA, Parts("transformer", "blocks", "wte"))


def parts_of(model: nn.Module) -> Parts:
    """Those of a model that mlx_finetune.engines.mlx.load gives."""
    return next((parts for parts in KNOWN if parts.backbone in model), LLAMA)


@contextmanager
def replaced(model: nn.Module, name: str, layers: Any) -> Iterator[None]:
    """Inside, `layers` stands in for what the model calls by that name."""
    own = model[name]
    model[name] = layers
    try:
        yield
    finally:
        model[name] = own
