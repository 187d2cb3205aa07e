"""The one loop. Everything that (seed, step) can compute is computed, so a run's position is one integer."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import Batch
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.engines import Engine, StepResult
from mlx_finetune.engines.ranks import PeerGone, any_of
from mlx_finetune.errors import UserError
from mlx_finetune.training.ahead import Ahead, ahead
from mlx_finetune.training.checkpoint import Origin, checkpoint_folder, point, save_checkpoint
from mlx_finetune.training.held_out import held_out_loss
from mlx_finetune.training.interrupt import interruptible
from mlx_finetune.training.memory_watch import NoMemory, memory_errors, watched
from mlx_finetune.training.metrics import Metrics, Unwritten, read_metrics
from mlx_finetune.training.schedule import learning_rate

Advance = Callable[[int, int, str], None]  # steps done, steps in all, a note


@dataclass(frozen=True)
class Trained:
    """How far the loop came. Rates count the time of the steps alone, not evaluation or saving."""

    step: int
    steps: int
    interrupted: bool  # by Ctrl-C, or by a shortage
    tokens_learned: int
    tokens_seen: int
    tokens_computed: int  # padding included; what several examples of a step begin with counts once
    seconds: float
    shortage: str | None = None  # of memory: why it stopped early


def total_steps(dataset: Dataset, config: RunConfig) -> int:
    """`steps` where given, else as many as `epochs` take."""
    return config.steps or math.ceil(config.epochs * dataset.steps_per_epoch(config))


def train(engine: Engine, dataset: Dataset, config: RunConfig, run: Path, origin: Origin, start: int, advance: Advance) -> Trained:
    """Steps `start` to the end; writes metrics and checkpoints into `run`, and moves `latest` and `best`.

    Where several processes train together all of them are here, and the first alone writes.

    Raises:
        UserError: the loss or the gradient is not a number, there is no memory, or another process is gone; the last good
            checkpoint stays.
    """
    loop = _Loop(engine, dataset, config, run, origin, start, advance)
    loop.begin()
    with interruptible() as interrupt:
        try:
            with ahead(dataset, config, loop.steps) as batches, watched() as watch:
                while loop.done < loop.steps and not loop.stopped:
                    loop.step(batches)
                    better, shortage = loop.look_at_held_out(), watch.shortage()
                    loop.stop(any_of(engine.ranks, interrupt.asked or bool(shortage)), shortage)
                    loop.save(better)
        except (PeerGone, NoMemory) as error:
            interrupt.ending = isinstance(error, PeerGone)
            loop.save_unfinished()
            raise
    return loop.trained()


class _Loop:
    """Where a run is, and what it has seen since it was started."""

    def __init__(
        self, engine: Engine, dataset: Dataset, config: RunConfig, run: Path, origin: Origin, start: int, advance: Advance
    ) -> None:
        self.engine, self.dataset, self.config, self.run, self.origin = engine, dataset, config, run, origin
        self.start, self.done, self.advance = start, start, advance
        self.steps, self.first = total_steps(dataset, config), engine.ranks.rank == 0
        self.metrics = Metrics(run / "metrics.jsonl", start) if self.first else Unwritten()
        self.look = _Look(engine, dataset.held_out(config.batch_size), self.metrics)
        self.stopped = False
        self.shortage: str | None = None
        self.learned, self.seen, self.computed, self.seconds = 0, 0, 0, 0.0

    def begin(self) -> None:
        """Mends `best`, and measures the model as it is at the start."""
        if self.first:
            self.look.point_best(self.run)
        if self.start == 0:
            self.advance(0, self.steps, "held-out loss before the first step")
            with memory_errors(0, self.config):
                self.look.at(0)

    def step(self, batches: Ahead) -> None:
        """One optimizer step."""
        began, number = time.perf_counter(), self.done
        rate = learning_rate(number, self.steps, self.config)
        with memory_errors(number + 1, self.config):
            result = self.engine.step(batches.batches_at(number), rate, self.config.seed + number)
        _check_finite(number + 1, result)
        seconds = time.perf_counter() - began
        self.done, self.seconds = number + 1, self.seconds + seconds
        self.learned, self.seen = self.learned + result.tokens, self.seen + self.dataset.tokens_at(number, self.config)
        self.computed += result.computed
        self.metrics.train(self.done, result, rate, seconds)
        self.advance(self.done, self.steps, f"step {self.done} of {self.steps}, loss {result.loss:.3f}")

    def look_at_held_out(self) -> bool:
        """Where it is due; whether this is the best so far."""
        with memory_errors(self.done, self.config):
            return self.look.at(self.done) if self.done % self.config.eval_every == 0 or self.done == self.steps else False

    def stop(self, asked: bool, shortage: str | None) -> None:
        """After this step, where it is asked for on any process."""
        self.stopped, self.shortage = asked, shortage

    def save(self, better: bool) -> None:
        """A checkpoint where it is due, and `best` where it is."""
        if self.first and (better or self.done % self.config.save_every == 0 or self.done == self.steps or self.stopped):
            folder = save_checkpoint(self.run, self.engine, self.done, self.config, self.origin)
            if better or not self.look.held_out:
                point(self.run / "best", folder)

    def save_unfinished(self) -> None:
        """A step failed, before it changed anything: what the last one left is here as well."""
        late = self.done > self.start and not checkpoint_folder(self.run, self.done).exists()
        if self.first and late and self.engine.whole:
            save_checkpoint(self.run, self.engine, self.done, self.config, self.origin)

    def trained(self) -> Trained:
        """How far it came."""
        early = self.done < self.steps
        counts = self.learned, self.seen, self.computed
        return Trained(self.done, self.steps, early, *counts, self.seconds, self.shortage if early else None)


class _Look:
    """Held-out losses as they are measured, and the lowest so far (the base model's does not count)."""

    def __init__(self, engine: Engine, held_out: dict[str, list[Batch]], metrics: Metrics | Unwritten) -> None:
        self.engine, self.held_out, self.metrics = engine, held_out, metrics
        rows = read_metrics(metrics.path) if isinstance(metrics, Metrics) else []
        before = [(row["loss"], row["step"]) for row in rows if row["split"] == "valid" and row["step"]]
        self.best: float = min(before)[0] if before else math.inf
        self.best_step: int = min(before)[1] if before else 0

    def point_best(self, run: Path) -> None:
        """Mends `best` where a crash fell between a checkpoint and its link."""
        folder = checkpoint_folder(run, self.best_step)
        if folder.is_dir():
            point(run / "best", folder)

    def at(self, step: int) -> bool:
        """Measures and logs; whether this is the best after a step of training."""
        if not self.held_out:
            return False
        measured = held_out_loss(self.engine, self.held_out)
        self.metrics.held_out(step, measured.loss, measured.by_source)
        better = step > 0 and measured.loss < self.best
        self.best = measured.loss if better else self.best
        return better


def _check_finite(step: int, result: StepResult) -> None:
    if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
        raise UserError(
            f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}", hint="start a new run with a lower learning_rate"
        )
