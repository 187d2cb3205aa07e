"""The one loop. Everything that (seed, step) can compute is computed, so a run's position is one integer."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_finetune.config import RunConfig
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.engines import Engine, StepResult
from mlx_finetune.engines.ranks import PeerGone, any_of
from mlx_finetune.errors import UserError
from mlx_finetune.terminal import say
from mlx_finetune.training.ahead import Ahead, ahead
from mlx_finetune.training.checkpoint import Origin, checkpoint_folder, point, save_checkpoint
from mlx_finetune.training.checkpoints import prune, saved
from mlx_finetune.training.evaluations import Evaluations
from mlx_finetune.training.interrupt import interruptible
from mlx_finetune.training.memory_watch import NoMemory, again, memory_errors, watched
from mlx_finetune.training.metrics import applied, not_applied_in_a_row
from mlx_finetune.training.offenders import Offending, offending_in_step
from mlx_finetune.training.progress import Advance, Now, Standing
from mlx_finetune.training.schedule import learning_rate

IN_A_ROW = 3  # steps that are not applied, at which a run ends


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
    shortage: str | None = None  # of memory: why it was interrupted
    stopped_early: str | None = None  # why, where patience was at its end before the steps were; then it is not interrupted
    not_applied: int = 0  # steps whose loss or gradient was not finite
    asked_to_end: bool = False  # a Ctrl-C came, also where it came too late to end anything


def total_steps(dataset: Dataset, config: RunConfig) -> int:
    """`steps` where given, else as many as `epochs` take."""
    return config.steps or math.ceil(config.epochs * dataset.steps_per_epoch(config))


def train(
    engine: Engine, dataset: Dataset, config: RunConfig, run: Path, origin: Origin, start: int, look: Evaluations, advance: Advance
) -> Trained:
    """Steps `start` to the end; writes metrics, answers and checkpoints into `run`, and moves `latest` and `best`.

    Where several processes train together all of them are here, and the first alone writes.

    Raises:
        UserError: the loss or the gradient of `IN_A_ROW` steps is not finite, there is no memory, or another process is gone; the
            last good checkpoint stays.
    """
    loop = _Loop(engine, dataset, config, run, origin, start, look, advance)
    loop.begin()
    with interruptible() as interrupt:
        try:
            with ahead(dataset, config, loop.steps) as batches, watched() as watch:
                while loop.done < loop.steps and not loop.stopped:
                    loop.step(batches)
                    better, shortage = loop.look_at_held_out(), watch.shortage()
                    loop.stop(any_of(engine.ranks, interrupt.asked or bool(shortage)), shortage)
                    loop.save(better)
        except NotFinite:
            interrupt.ending = True
            raise
        except (PeerGone, NoMemory) as error:
            interrupt.ending = isinstance(error, PeerGone)
            loop.save_unfinished()
            raise
    return loop.trained(interrupt.asked)


class NotFinite(UserError):
    """Too many steps in a row could not be applied."""


class _Loop:
    """Where a run is, and what it has seen since it was started."""

    def __init__(
        self,
        engine: Engine,
        dataset: Dataset,
        config: RunConfig,
        run: Path,
        origin: Origin,
        start: int,
        look: Evaluations,
        advance: Advance,
    ) -> None:
        self.engine, self.dataset, self.config, self.run, self.origin = engine, dataset, config, run, origin
        self.start, self.done, self.look, self.advance = start, start, look, advance
        self.steps, self.first = total_steps(dataset, config), engine.ranks.rank == 0
        self.stopped = False
        self.shortage: str | None = None
        self.over: str | None = None  # why patience is at its end
        self.loss: float | None = None
        self.learned, self.seen, self.computed, self.seconds = 0, 0, 0, 0.0
        self.not_applied, self.usable = 0, True  # usable: an example gave finite numbers in the last step, or held out
        own = not_applied_in_a_row(look.metrics.kept)
        self.in_a_row = int(engine.ranks.sum(np.array([float(own)]))[0])  # the first process alone has rows
        tried = (row["step"] - 1 for row in look.metrics.kept if row["split"] == "train" and applied(row))
        self.proven = max(tried, default=0)  # the model as it was after so many steps has given finite numbers

    def begin(self) -> None:
        """Mends `best`, and measures the model where it is due and was not; a run that stopped early is over still."""
        if self.first:
            self.look.point_best(self.run)
        if self.start == 0:
            self._measure()
            return
        if self._is_due():
            self._catch_up()
        if self.done < self.steps:
            self.over = self.look.over()
            self.stopped = self.over is not None

    def _catch_up(self) -> None:
        """What an end between a step and the end of its measurement left out."""
        if any_of(self.engine.ranks, self.first and self.look.unmeasured(self.done)):
            better = self._measure()
        else:
            better = False
            with memory_errors(self.done, self.config):
                self.look.answer(self.done)
        if self.first and better:
            point(self.run / "best", checkpoint_folder(self.run, self.done))
            prune(self.run, self.config.keep)

    def step(self, batches: Ahead) -> None:
        """One optimizer step, which changes nothing where loss or gradient is not finite; too many such in a row end the run."""
        began, number = time.perf_counter(), self.done
        rate = learning_rate(number, self.steps, self.config)
        with memory_errors(number + 1, self.config):
            result = self.engine.step(batches.batches_at(number), rate, self.config.seed + number)
        seconds = time.perf_counter() - began
        offending = None if result.finite else self._offending(number, result)
        self.done, self.seconds, self.loss = number + 1, self.seconds + seconds, result.loss
        self.seen += self.dataset.tokens_at(number, self.config)
        self.computed += result.computed
        self.look.metrics.train(self.done, result, rate, seconds, self.engine.peak_memory(), offending)
        if offending:
            self.not_applied, self.in_a_row, self.usable = self.not_applied + 1, self.in_a_row + 1, not offending.every
            self._refuse_too_many()
        else:
            self.learned, self.in_a_row, self.usable, self.proven = self.learned + result.tokens, 0, True, number
        if not self._is_due():
            self._say("stepped")

    def _offending(self, number: int, result: StepResult) -> Offending:
        """Looks for the examples that are to blame, and says so."""
        with memory_errors(number + 1, self.config):
            found = offending_in_step(self.engine, self.dataset, self.config, number)
        say(f"step {number + 1} was not applied: loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}; {found}")
        return found

    def _refuse_too_many(self) -> None:
        """Ends a run that does not get on. What it holds is saved where the model gives finite numbers."""
        if self.in_a_row < IN_A_ROW:
            return
        if self.first and self.usable and not checkpoint_folder(self.run, self.done).exists():
            save_checkpoint(self.run, self.engine, self.done, self.config, self.origin)
        any_of(self.engine.ranks, False)  # the others wait: a launcher ends all as soon as one has
        steps = f"steps {self.done - self.in_a_row + 1} to {self.done}"
        message = f"{steps} were not applied, {self.in_a_row} in a row: their loss or gradient is not finite"
        raise NotFinite(message, hint=way_on(self.run, self.config, self.done if self.usable else None, self.proven))

    def look_at_held_out(self) -> bool:
        """Where it is due; whether this is the best so far. Sees too whether patience is at its end."""
        if not self._is_due():
            return False
        better = self._measure()
        self.over = self.look.over() if self.done < self.steps else None
        return better

    def stop(self, asked: bool, shortage: str | None) -> None:
        """After this step, where it is asked for on any process, or patience is at its end."""
        self.stopped, self.shortage = asked or self.over is not None, shortage

    def save(self, better: bool) -> None:
        """A checkpoint where it is due, and `best` where it is."""
        if self.first and (better or self.done % self.config.save_every == 0 or self.done == self.steps or self.stopped):
            folder = save_checkpoint(self.run, self.engine, self.done, self.config, self.origin)
            if better or (not self.look.held_out and self.usable):
                point(self.run / "best", folder)
            if self.usable:  # else the last good one might be deleted
                prune(self.run, self.config.keep)

    def save_unfinished(self) -> None:
        """A step failed, before it changed anything: what the last one left is here as well."""
        late = self.done > self.start and not checkpoint_folder(self.run, self.done).exists()
        if self.first and late and self.engine.whole:
            save_checkpoint(self.run, self.engine, self.done, self.config, self.origin)

    def trained(self, asked: bool) -> Trained:
        """How far it came; `asked`: by Ctrl-C, which in the last step finds nothing left to end."""
        interrupted = self.done < self.steps and self.over is None
        counts = self.learned, self.seen, self.computed
        shortage = self.shortage if interrupted else None
        return Trained(self.done, self.steps, interrupted, *counts, self.seconds, shortage, self.over, self.not_applied, asked)

    def _is_due(self) -> bool:
        return self.done % self.config.eval_every == 0 or self.done == self.steps

    def _measure(self) -> bool:
        self._say("measuring")
        with memory_errors(self.done, self.config):
            better = self.look.at(self.done)
        if self.look.last is not None and math.isfinite(self.look.last):
            self.proven, self.usable = self.done, True
        self._say("measured")
        return better

    def _say(self, now: Now) -> None:
        rate = self.seen / self.seconds if self.seconds else None
        standing = Standing(self.done, self.steps, now, self.loss, self.look.last, rate, self.engine.peak_memory())
        self.advance(self.done, self.steps, standing)


def way_on(run: Path, config: RunConfig, usable: int | None, proven: int) -> str:
    """What to do where steps cannot be applied. `usable`: the step that was saved last; None where the model gives no numbers.

    proven: the last step after which the model has given finite numbers.
    """
    goes_on, wider = again(str(run)), config.dtype == "float16"
    command = f"{goes_on} --set dtype=float32" if wider else goes_on
    if usable is not None:
        return f"{checkpoint_folder(run, usable)} is good: {command} goes on behind the examples that were named"
    good = [folder for folder in saved(run) if int(folder.name.removeprefix("step-")) <= proven]
    lower = "start a new run with a lower learning_rate" + (f", or where float16 is too narrow: {command}" if wider else "")
    if not good:
        return lower
    start = f"; with adapter_path={good[-1]} it begins there" if config.fine_tune_type != "full" else ""
    return f"the last good checkpoint is {good[-1]}; {lower}{start}"
