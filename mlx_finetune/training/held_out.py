"""Held-out loss: sums travel, the mean is for printing."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mlx_finetune.data.batches import Batch
from mlx_finetune.data.sources.openassistant import SOURCE as OPENASSISTANT
from mlx_finetune.engines import Engine
from mlx_finetune.engines.ranks import Alone
from mlx_finetune.engines.work import share_of


@dataclass(frozen=True)
class HeldOut:
    """Mean nats a learned token: over a person's own conversations, and by source.

    OpenAssistant is shown beside and never mixed into `loss`, unless nothing else was held out.
    """

    loss: float
    by_source: dict[str, float]
    tokens: int  # behind `loss`
    tokens_by_source: dict[str, int]


def judged_by(sources: Iterable[str]) -> list[str]:
    """The sources that make up the loss."""
    every = sorted(sources)
    return [source for source in every if source != OPENASSISTANT] or every


def held_out_loss(engine: Engine, batches: dict[str, list[Batch]]) -> HeldOut:
    """Weighted by token over all batches of the sources that count; `batches` must not be empty.

    Each process of a run computes its share of them.
    """
    ranks = Alone() if engine.lockstep else engine.ranks
    mine = {s: [each[i] for i in share_of([b.inputs.size for b in each], ranks.rank, ranks.size)] for s, each in batches.items()}
    own = np.array([sum(engine.loss_sum(batch) for batch in each) for each in mine.values()], np.float64)
    sums = dict(zip(batches, ranks.sum(own).tolist(), strict=True))
    weights = {source: sum(batch.learned for batch in each) for source, each in batches.items()}
    tokens = {source: sum(int((batch.weights > 0).sum()) for batch in each) for source, each in batches.items()}
    counted = judged_by(batches)
    loss = sum(sums[source] for source in counted) / sum(weights[source] for source in counted)
    by_source = {source: sums[source] / weights[source] for source in batches}
    return HeldOut(loss, by_source, sum(tokens[source] for source in counted), tokens)
