"""Where a model of mlx-lm keeps its embeddings, its layers and its head, and what transformers calls them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from mlx_finetune.errors import UserError

LAYERS = ("layers", "h", "blocks")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "embeddings")


@dataclass(frozen=True)
class Parts:
    """The backbone, which makes hidden states of tokens, stands in `owner` under `name`; its parts by what it calls them."""

    owner: nn.Module
    name: str
    layers: str
    embeddings: str

    @property
    def backbone(self) -> Any:
        """Embeddings, layers and the norm behind them."""
        return self.owner[self.name]

    @contextmanager
    def replaced(self, other: Any) -> Iterator[None]:
        """Inside, `other` stands in for the backbone."""
        own = self.backbone
        self.owner[self.name] = other
        try:
            yield
        finally:
            self.owner[self.name] = own


def parts_of(model: nn.Module) -> Parts:
    """The first module with embeddings and a list of layers.

    Raises:
        UserError: a model without, or one whose head is within: what lies behind the layers cannot be computed by itself.
    """
    hint = "use --engine torch"
    for path, module in sorted(model.named_modules(), key=lambda item: item[0].count(".")):
        layers = next((name for name in LAYERS if isinstance(module.get(name), list)), None)
        embeddings = next((name for name in EMBEDDINGS if isinstance(module.get(name), nn.Module)), None)
        if path and layers and embeddings:
            if "embed_out" in module or "lm_head" in module:
                raise UserError("the MLX engine does not train this architecture: its head is not apart", hint=hint)
            owner, _, name = path.rpartition(".")
            return Parts(dict(model.named_modules())[owner], name, layers, embeddings)
    raise UserError("the MLX engine does not train this architecture: no embeddings beside its layers", hint=hint)


def train_recurrences(model: nn.Module) -> None:
    """Where a class has a kernel for Metal that knows no gradient, it is told to take the way that has one."""
    for module in model.modules():
        if "A_log" in module:
            module.train()
