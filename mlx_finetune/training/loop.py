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
from mlx_finetune.engines.ranks import any_of
from mlx_finetune.errors import UserError
from mlx_finetune.training.ahead import ahead
from mlx_finetune.training.checkpoint import Origin, checkpoint_folder, point, save_checkpoint
from mlx_finetune.training.held_out import held_out_loss
from mlx_finetune.training.interrupt import interruptible
from mlx_finetune.training.memory_watch import memory_errors, watched
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

    Raises:
        UserError: the loss or the gradient is not a number, or there is no memory; the last good checkpoint stays.
    """
    steps, first = total_steps(dataset, config), engine.ranks.rank == 0
    metrics = Metrics(run / "metrics.jsonl", start) if first else Unwritten()
    look = _Look(engine, dataset.held_out(config.batch_size), metrics)
    learned, seen, computed, spent, done, shortage, stop = 0, 0, 0, 0.0, start, None, False
    if first:
        look.point_best(run)
    if start == 0:
        advance(0, steps, "held-out loss of the base model")
        with memory_errors(0, config):
            look.at(0)
    with interruptible() as interrupt, ahead(dataset, config, steps) as batches, watched() as watch:
        while done < steps and not stop:
            began = time.perf_counter()
            rate = learning_rate(done, steps, config)
            with memory_errors(done + 1, config):
                result = engine.step(batches.batches_at(done), rate, config.seed + done)
            _check_finite(done + 1, result)
            seconds = time.perf_counter() - began
            learned, seen, spent = learned + result.tokens, seen + dataset.tokens_at(done, config), spent + seconds
            computed += result.computed
            done += 1
            metrics.train(done, result, rate, seconds)
            advance(done, steps, f"step {done} of {steps}, loss {result.loss:.3f}")
            with memory_errors(done, config):
                better = look.at(done) if done % config.eval_every == 0 or done == steps else False
            shortage = watch.shortage()
            stop = any_of(engine.ranks, interrupt.asked or bool(shortage))
            if first and (better or done % config.save_every == 0 or done == steps or stop):
                folder = save_checkpoint(run, engine, done, config, origin)
                if better or not look.held_out:
                    point(run / "best", folder)
    return Trained(done, steps, done < steps, learned, seen, computed, spent, shortage if done < steps else None)


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
