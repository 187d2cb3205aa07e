"""The one loop. Everything that (seed, step) can compute is computed, so a run's position is one integer."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_finetune.config import RunConfig
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.engines import Engine
from mlx_finetune.errors import UserError
from mlx_finetune.training.checkpoint import Origin, point, save_checkpoint
from mlx_finetune.training.held_out import held_out_loss
from mlx_finetune.training.interrupt import interruptible
from mlx_finetune.training.metrics import Metrics, read_metrics
from mlx_finetune.training.schedule import learning_rate

Advance = Callable[[int, int, str], None]  # steps done, steps in all, a note


@dataclass(frozen=True)
class Trained:
    """How far the loop came. Rates count the time of the steps alone, not evaluation or saving."""

    step: int
    steps: int
    interrupted: bool
    tokens_learned: int
    tokens_seen: int
    seconds: float


def total_steps(dataset: Dataset, config: RunConfig) -> int:
    """`steps` where given, else as many as `epochs` take."""
    return config.steps or math.ceil(config.epochs * dataset.steps_per_epoch(config))


def train(engine: Engine, dataset: Dataset, config: RunConfig, run: Path, origin: Origin, start: int, advance: Advance) -> Trained:
    """Steps `start` to the end; writes metrics and checkpoints into `run`, and moves `latest` and `best`.

    Raises:
        UserError: the loss or the gradient is not a number; the last good checkpoint stays.
    """
    steps, held_out = total_steps(dataset, config), dataset.held_out(config.batch_size)
    metrics = Metrics(run / "metrics.jsonl", start)
    best = min((row["loss"] for row in read_metrics(metrics.path) if row["split"] == "valid" and row["step"]), default=math.inf)
    learned = seen = 0
    spent, done = 0.0, start
    if held_out and start == 0:
        advance(0, steps, "held-out loss of the base model")
        measured = held_out_loss(engine, held_out)
        metrics.held_out(0, measured.loss, measured.by_source)
    with interruptible() as interrupt:
        while done < steps and not interrupt.asked:
            began = time.perf_counter()
            rate, batches = learning_rate(done, steps, config), dataset.batches_at(done, config)
            result = engine.step(batches, rate, config.seed + done)
            if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
                raise UserError(
                    f"step {done + 1}: loss {result.loss}, gradient {result.grad_norm}", hint="use a lower learning_rate"
                )
            done, spent = done + 1, spent + time.perf_counter() - began
            learned, seen = learned + result.tokens, seen + sum(batch.inputs.size for batch in batches)
            metrics.train(done, result, rate, time.perf_counter() - began)
            advance(done, steps, f"loss {result.loss:.3f}")
            better = False
            if held_out and (done % config.eval_every == 0 or done == steps):
                measured = held_out_loss(engine, held_out)
                metrics.held_out(done, measured.loss, measured.by_source)
                better, best = measured.loss < best, min(best, measured.loss)
            if better or done % config.save_every == 0 or done == steps or interrupt.asked:
                folder = save_checkpoint(run, engine, done, config, origin)
                if better or not held_out:
                    point(run / "best", folder)
    return Trained(done, steps, done < steps, learned, seen, spent)
