"""Which examples give no finite loss or gradient, found by looking at each alone; they are named, and nothing of their text is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import Batch, Example
from mlx_finetune.data.dataset import Dataset, ExampleStore
from mlx_finetune.engines import Engine
from mlx_finetune.terminal import printable

NAMED = 4  # in one line of talk; the others are counted
KEPT = 64  # no more of a step or a held-out loss are looked for
HELD_OUT = 256  # no more held-out examples are looked at
Gives = Literal["loss", "gradient"]


@dataclass(frozen=True)
class Offender:
    """An example that alone gives no finite number."""

    row: int  # of the data set's file, from 0
    conversation: str  # id
    turns: tuple[int, ...]  # places of its learned messages in the conversation
    gives: Gives  # which of the two is not finite; a loss that is not has no gradient either

    def __str__(self) -> str:
        turns = f"turn{'s' if len(self.turns) > 1 else ''} {', '.join(map(str, self.turns))}"
        return f"conversation {printable(self.conversation)} (row {self.row}, {turns}): its {self.gives}"


@dataclass(frozen=True)
class Offending:
    """What was found among the first `looked` of `examples` examples."""

    examples: int
    offenders: tuple[Offender, ...]
    looked: int
    every: bool  # whether none that was looked at gives a finite number, which is then no fault of theirs

    def __str__(self) -> str:
        """One line, without names where none offends or all do."""
        of = f"its {self.examples} examples" if self.examples > 1 else "its only example"
        if self.looked < self.examples:
            of = f"the first {self.looked} of {of}"
        if self.every:
            return f"{f'each of {of}' if self.examples > 1 else of} is not finite alone either"
        if not self.offenders:
            return f"each of {of} alone is finite" if self.examples > 1 else f"{of} computed again is finite"
        more = f"; and {len(self.offenders) - NAMED} more" if len(self.offenders) > NAMED else ""
        rest = f"; {self.examples - self.looked} more examples were not looked at" if self.looked < self.examples else ""
        return f"not finite alone: {'; '.join(map(str, self.offenders[:NAMED]))}{more}{rest}"

    def to_json(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        bounded = len(self.offenders) == KEPT or self.looked < self.examples
        more = {"looked": self.looked, "every": self.every} if bounded else {}
        return {
            "examples": self.examples,
            **more,
            "offending": [asdict(one) | {"turns": list(one.turns)} for one in self.offenders],
        }


def offending_in_step(engine: Engine, dataset: Dataset, config: RunConfig, step: int) -> Offending:
    """Of step `step` (from 0): each of its examples forward and backward. A matter of all processes of a run; changes nothing."""

    def gives(example: Example) -> Gives | None:
        result = engine.measure([Batch.of([example])], config.seed + step)
        return None if result.finite else "gradient" if math.isfinite(result.loss) else "loss"

    places = [place for micro_batch in dataset.examples_at(step, config) for place in micro_batch]
    return search(dataset.train, places, len(places), gives)


def offending_held_out(engine: Engine, store: ExampleStore, places: Sequence[int]) -> Offending:
    """Of the first `HELD_OUT` of those examples, by their loss; in this process alone, for which the others wait."""

    def gives(example: Example) -> Gives | None:
        return None if math.isfinite(engine.loss_sum(Batch.of([example]))) else "loss"

    return search(store, places, HELD_OUT, gives)


def search(store: ExampleStore, places: Sequence[int], most: int, gives: Callable[[Example], Gives | None]) -> Offending:
    """Ends at `KEPT` offenders, but not before it is known whether any example gives a finite number, or `most` were looked at."""
    found: list[Offender] = []
    looked, finite = 0, False
    for place in places[:most]:
        if finite and len(found) >= KEPT:
            break
        example = store[place]
        looked += 1
        if (what := gives(example)) is None:
            finite = True
        elif len(found) < KEPT:
            found.append(Offender(place, example.conversation, example.turns, what))
    return Offending(len(places), tuple(found), looked, not finite)
