"""What MLX computes at once."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_finetune.data.trees import Placed
from mlx_finetune.engines.mlx.attention import Layout
from mlx_finetune.engines.work import Work


@dataclass(frozen=True)
class Input:
    """`Work` as MLX takes it."""

    inputs: mx.array  # int32 [B, T]
    rows: tuple[Placed, ...]
    layout: Layout | None  # None: each sees all before it in its row
    places: mx.array  # int32 [n], in the flattened inputs
    targets: mx.array  # int32 [n]
    weights: mx.array  # float32 [n]
    noise: mx.array | None = None  # on the embeddings [B, T, D]

    @classmethod
    def of(cls, work: Work, by_layout: bool, noise: np.ndarray | None = None) -> "Input":
        """`by_layout`: rows follow a layout too, as trees do."""
        layout = None
        if work.tree or (by_layout and work.inputs.shape[1] > 1):
            layout = Layout(work.segments, work.tree.positions if work.tree else None)
        inputs, places, targets, weights = map(mx.array, (work.inputs, work.places, work.targets, work.weights))
        return cls(inputs, work.rows, layout, places, targets, weights, None if noise is None else mx.array(noise))

    def layouts(self, layers: int) -> list[Layout] | None:
        """As the model's layers take caches."""
        return None if self.layout is None else [self.layout] * layers
