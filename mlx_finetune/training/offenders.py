"""Which examples give no finite loss or gradient, found by looking at each alone; they are named, and nothing of their text is."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import Batch
from mlx_finetune.data.dataset import Dataset, ExampleStore
from mlx_finetune.engines import Engine
from mlx_finetune.terminal import printable

NAMED = 4  # in one line of talk; the others are counted


@dataclass(frozen=True)
class Offender:
    """An example that alone gives no finite number."""

    row: int  # of the data set's file, from 0
    conversation: str  # id
    turns: tuple[int, ...]  # places of its learned messages in the conversation
    gives: Literal["loss", "gradient"]  # which of the two is not finite; a loss that is not has no gradient either

    def __str__(self) -> str:
        turns = f"turn{'s' if len(self.turns) > 1 else ''} {', '.join(map(str, self.turns))}"
        return f"conversation {printable(self.conversation)} (row {self.row}, {turns}): its {self.gives}"


@dataclass(frozen=True)
class Offending:
    """What was found among `examples` examples."""

    examples: int
    offenders: tuple[Offender, ...]

    @property
    def every(self) -> bool:
        """Whether no example gives a finite number, which is then no fault of theirs."""
        return len(self.offenders) == self.examples

    def __str__(self) -> str:
        """One line, without names where none offends or all do."""
        of = f"its {self.examples} examples" if self.examples > 1 else "its only example"
        if self.every:
            return f"{f'each of {of}' if self.examples > 1 else of} is not finite alone either"
        if not self.offenders:
            return f"each of {of} alone is finite" if self.examples > 1 else f"{of} computed again is finite"
        more = f"; and {len(self.offenders) - NAMED} more" if len(self.offenders) > NAMED else ""
        return f"not finite alone: {'; '.join(map(str, self.offenders[:NAMED]))}{more}"

    def to_json(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        return {"examples": self.examples, "offending": [asdict(one) | {"turns": list(one.turns)} for one in self.offenders]}


def offending_in_step(engine: Engine, dataset: Dataset, config: RunConfig, step: int) -> Offending:
    """Of step `step` (from 0): each of its examples forward and backward. A matter of all processes of a run; changes nothing."""
    places = [place for micro_batch in dataset.examples_at(step, config) for place in micro_batch]
    found = []
    for place in places:
        example = dataset.train[place]
        result = engine.measure([Batch.of([example])], config.seed + step)
        if not result.finite:
            gives: Literal["loss", "gradient"] = "gradient" if math.isfinite(result.loss) else "loss"
            found.append(Offender(place, example.conversation, example.turns, gives))
    return Offending(len(places), tuple(found))


def offending_held_out(engine: Engine, store: ExampleStore, places: Sequence[int]) -> Offending:
    """Of those examples, by their loss; in this process alone."""
    found = []
    for place in places:
        example = store[place]
        if not math.isfinite(engine.loss_sum(Batch.of([example]))):
            found.append(Offender(place, example.conversation, example.turns, "loss"))
    return Offending(len(places), tuple(found))
