"""What is looked at every so many steps: the held-out loss, whether it is the lowest or too long no lower, and a few answers."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import Batch
from mlx_finetune.data.dataset import Dataset, ExampleStore
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.engines import Engine
from mlx_finetune.engines.ranks import any_of
from mlx_finetune.terminal import say
from mlx_finetune.training.checkpoint import checkpoint_folder, point
from mlx_finetune.training.checkpoints import saved
from mlx_finetune.training.held_out import held_out_loss
from mlx_finetune.training.metrics import Metrics, Unwritten
from mlx_finetune.training.offenders import Offending, offending_held_out
from mlx_finetune.training.patience import out_of_patience
from mlx_finetune.training.samples import Prompt, Samples
from mlx_finetune.training.tracking import tracked


class Evaluations:
    """Held-out losses as they are measured, and the lowest so far: the base model's does not count, nor one that is not finite."""

    def __init__(
        self,
        engine: Engine,
        held_out: dict[str, list[Batch]],
        metrics: Metrics | Unwritten,
        samples: Samples | None,
        patience: int,
        store: ExampleStore | None = None,
    ) -> None:
        """`metrics`: with those of before, where a run goes on. `samples`: of the process that writes them.

        store: the examples that `held_out` is made of, to name those that give no number.
        """
        self.held_out, self._store = held_out, store
        self.metrics, self._engine, self._samples, self._patience = metrics, engine, samples, patience
        self._measured = [(row["step"], row["loss"]) for row in metrics.kept if row["split"] == "valid"]

    @property
    def last(self) -> float | None:
        """The loss that was measured last, of the base model too."""
        return self._measured[-1][1] if self._measured else None

    @property
    def _finite(self) -> Sequence[tuple[int, float]]:
        """Of those after a step of training."""
        return [(step, loss) for step, loss in self._measured if step and math.isfinite(loss)]

    def point_best(self, run: Path) -> None:
        """Mends `best` where a crash fell between a checkpoint and its link, or what it pointed to is no longer there."""
        there = [(loss, step) for step, loss in self._finite if checkpoint_folder(run, step).is_dir()]
        last = next(reversed(saved(run)), None) if not self.held_out else None
        if best := checkpoint_folder(run, min(there)[1]) if there else last:
            point(run / "best", best)

    def unmeasured(self, step: int) -> bool:
        """Whether there is something to measure and no loss of that step, for the process that has the rows of before."""
        return bool(self.held_out) and all(step != measured for measured, _ in self._measured)

    def at(self, step: int) -> bool:
        """Measures, logs, and answers the prompts; whether this is the best after a step of training."""
        better = False
        if self.held_out:
            measured = held_out_loss(self._engine, self.held_out)
            better = step > 0 and measured.loss < min((loss for _, loss in self._finite), default=math.inf)
            self.metrics.held_out(step, measured.loss, measured.by_source, self._offending(step, measured.by_source))
            self._measured.append((step, measured.loss))
        self.answer(step)
        return better

    def answer(self, step: int) -> None:
        """The prompts, where they are not answered for that step yet."""
        if self._samples:
            self._samples.at(step)

    def _offending(self, step: int, by_source: dict[str, float]) -> Offending | None:
        """Says which held-out examples give no finite loss, where there are such; by the process that writes."""
        sources = [source for source, loss in by_source.items() if not math.isfinite(loss)]
        if not sources or self._store is None or (self._engine.ranks.rank and not self._engine.lockstep):
            return None
        found = offending_held_out(self._engine, self._store, [i for i, s in enumerate(self._store.sources) if s in sources])
        say(f"step {step}: the held-out loss of {', '.join(sources)} is not finite; {found}")
        return found

    def over(self) -> str | None:
        """Why patience is at its end, in words; the same on each process, though the first alone knows what was measured before."""
        if not self._patience:
            return None
        reason = out_of_patience(((step, loss) for step, loss in self._measured if step), self._patience)
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
        yield Evaluations(engine, held_out, Unwritten(), None, config.patience, dataset.valid)
        return
    with tracked(config, run) as trackers:
        metrics = Metrics(run / "metrics.jsonl", start, trackers)
        alone = () if engine.lockstep else prompts  # others would have to compute along
        samples = Samples(engine, template, alone, config.sample_tokens, run, start)
        yield Evaluations(engine, held_out, metrics, samples, config.patience, dataset.valid)
