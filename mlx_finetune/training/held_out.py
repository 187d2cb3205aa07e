"""Held-out loss: sums travel, the mean is for printing."""

from dataclasses import dataclass

from mlx_finetune.data.batches import Batch
from mlx_finetune.engines import Engine


@dataclass(frozen=True)
class HeldOut:
    """Mean nats a learned token: over everything, and by source."""

    loss: float
    by_source: dict[str, float]
    tokens: int


def held_out_loss(engine: Engine, batches: dict[str, list[Batch]]) -> HeldOut:
    """Weighted by token over all batches of all sources; `batches` must not be empty."""
    sums = {source: sum(engine.loss_sum(batch) for batch in each) for source, each in batches.items()}
    weights = {source: sum(batch.learned for batch in each) for source, each in batches.items()}
    tokens = sum(int((batch.weights > 0).sum()) for each in batches.values() for batch in each)
    by_source = {source: sums[source] / weights[source] for source in batches}
    return HeldOut(sum(sums.values()) / sum(weights.values()), by_source, tokens)
