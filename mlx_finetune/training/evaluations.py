"""What is looked at every so many steps: the held-out loss, whether it is the lowest or too long no lower, and a few answers."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import Batch
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.engines import Engine
from mlx_finetune.engines.ranks import any_of
from mlx_finetune.training.checkpoint import checkpoint_folder, point
from mlx_finetune.training.held_out import held_out_loss
from mlx_finetune.training.metrics import Metrics, Unwritten
from mlx_finetune.training.patience import out_of_patience
from mlx_finetune.training.samples import Prompt, Samples
from mlx_finetune.training.tracking import tracked


class Evaluations:
    """Held-out losses as they are measured, and the lowest so far (the base model's does not count)."""

    def __init__(
        self, engine: Engine, held_out: dict[str, list[Batch]], metrics: Metrics | Unwritten, samples: Samples | None, patience: int
    ) -> None:
        """`metrics`: with those of before, where a run goes on. `samples`: of the process that writes them."""
        self.held_out = held_out
        self.metrics, self._engine, self._samples, self._patience = metrics, engine, samples, patience
        self._measured = [(row["step"], row["loss"]) for row in metrics.kept if row["split"] == "valid"]

    @property
    def last(self) -> float | None:
        """The loss that was measured last, of the base model too."""
        return self._measured[-1][1] if self._measured else None

    @property
    def _tuned(self) -> Sequence[tuple[int, float]]:
        return [(step, loss) for step, loss in self._measured if step]

    def point_best(self, run: Path) -> None:
        """Mends `best` where a crash fell between a checkpoint and its link."""
        best = min(((loss, step) for step, loss in self._tuned), default=None)
        if best and (folder := checkpoint_folder(run, best[1])).is_dir():
            point(run / "best", folder)

    def at(self, step: int) -> bool:
        """Measures, logs, and answers the prompts; whether this is the best after a step of training."""
        better = False
        if self.held_out:
            measured = held_out_loss(self._engine, self.held_out)
            better = step > 0 and measured.loss < min((loss for _, loss in self._tuned), default=math.inf)
            self.metrics.held_out(step, measured.loss, measured.by_source)
            self._measured.append((step, measured.loss))
        if self._samples:
            self._samples.at(step)
        return better

    def over(self) -> str | None:
        """Why patience is at its end, in words; the same on each process, though the first alone knows what was measured before."""
        if not self._patience:
            return None
        reason = out_of_patience(self._tuned, self._patience)
        first = self._engine.ranks.rank == 0
        return (reason or "the held-out loss is no lower") if any_of(self._engine.ranks, first and reason is not None) else None


@contextmanager
def evaluations(
    engine: Engine,
    dataset: Dataset,
    config: RunConfig,
    run: Path,
    start: int,
    prompts: Sequence[Prompt],
    template: ChatTemplate,
) -> Iterator[Evaluations]:
    """Those of the folder `run`, of which `start` steps are done; the first process alone writes, answers and tells trackers."""
    held_out = dataset.held_out(config.batch_size)
    if engine.ranks.rank:
        yield Evaluations(engine, held_out, Unwritten(), None, config.patience)
        return
    with tracked(config, run) as trackers:
        metrics = Metrics(run / "metrics.jsonl", start, trackers)
        alone = () if engine.lockstep else prompts  # others would have to compute along
        samples = Samples(engine, template, alone, config.sample_tokens, run, start)
        yield Evaluations(engine, held_out, metrics, samples, config.patience)
