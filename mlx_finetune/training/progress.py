"""What a person sees while a run goes on: a bar and one line of numbers in a terminal, else a line now and then."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mlx_finetune.launched import rank_of
from mlx_finetune.terminal import say

if TYPE_CHECKING:
    from rich.console import RenderableType

Now = Literal["stepped", "measuring", "measured"]


@dataclass(frozen=True)
class Standing:
    """Where a run is. `now`: a step is done, or a held-out loss is being measured after it, or has been."""

    step: int
    steps: int
    now: Now
    loss: float | None = None  # of the last step
    held_out: float | None = None  # as measured last
    tokens_per_second: float | None = None  # read, padding not counted; the time of steps alone
    memory: int | None = None  # bytes, the most held at once

    def __str__(self) -> str:
        """At most 79 characters, up to 99,999 steps and 99,999 tokens a second."""
        if not self.step and self.now == "measuring":
            return "measuring the model before the first step"
        parts = [f"step {self.step} of {self.steps}"]
        parts += [f"loss {self.loss:.3f}"] if self.loss is not None else []
        parts += [f"held out {self.held_out:.3f}"] if self.held_out is not None else []
        parts += [f"{self.tokens_per_second:,.0f} tokens/s"] if self.tokens_per_second is not None else []
        parts += [f"{self.memory / 1e9:.2f} GB"] if self.memory is not None else []
        return " · ".join(parts)


Advance = Callable[[int, int, Standing], None]  # steps done, steps in all


class Left:
    """How long a run still takes, judged by how long it took since it was started, looking and saving included."""

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None

    def after(self, done: int, steps: int) -> str:
        """Such as 1:02:03; empty where nothing is known yet."""
        now = time.monotonic()
        if self._began is None:
            self._began = now, done
        began, first = self._began
        return in_words((now - began) / (done - first) * (steps - done)) if done > first else ""


def in_words(seconds: float) -> str:
    """1:02:03 left."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02} left"


@contextmanager
def training_progress() -> Iterator[Advance]:
    """On stderr; of the first process alone where a launcher started several."""
    from rich.console import Console

    console = Console(stderr=True)
    if rank_of() or not console.is_terminal:
        yield _lines()
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.text import Text

    class Bar(Progress):
        below = Text("loading the model", no_wrap=True, overflow="ellipsis")

        def get_renderables(self) -> "Iterable[RenderableType]":
            yield from super().get_renderables()
            yield self.below

    left = Left()
    with Bar(TextColumn("train"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[left]}"), console=console) as bar:
        task = bar.add_task("train", total=None, left="")

        def advance(done: int, steps: int, standing: Standing) -> None:
            bar.below = Text(str(standing), no_wrap=True, overflow="ellipsis")
            bar.update(task, completed=done, total=steps, left=left.after(done, steps))

        yield advance


def _lines() -> Advance:
    """A line at every tenth, and one for each held-out loss."""
    said, left = -1, Left()

    def advance(done: int, steps: int, standing: Standing) -> None:
        nonlocal said
        tenth, rest = 10 * done // max(steps, 1), left.after(done, steps)
        if standing.now == "measured" or (standing.now == "stepped" and tenth != said):
            said = tenth
            say(f"train {100 * done // max(steps, 1)} % {standing}" + (f" · {rest}" if rest and done < steps else ""))

    return advance
