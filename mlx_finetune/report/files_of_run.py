"""What a run folder holds, read and checked: a file that is damaged is a line, never a page that is wrong."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.training.journal import read_rows
from mlx_finetune.training.metrics import read_metrics
from mlx_finetune.training.samples import NEEDED

EVALUATION, METRICS = "evaluation.json", "metrics.jsonl"


class Read(BaseModel):
    """What is read of a JSON object; what else it holds is for others."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Losses(Read):
    """Mean nats a learned token."""

    loss: float
    by_source: dict[str, float]
    tokens: int = 0
    tokens_by_source: dict[str, int] = {}


class Row(Read):
    """Losses of one group of held-out tokens; low and high: of the difference, None where nothing can be said."""

    group: str  # all, source, kind or turn
    name: str
    tokens: int
    conversations: int
    base: float
    tuned: float
    difference: float
    low: float | None = None
    high: float | None = None


class Rate(Read):
    """A share of the turns that were answered; None where there was none that it could be told of."""

    name: str
    of: int
    of_base: int | None = None  # where an answer did not say
    of_tuned: int | None = None
    base: float | None
    tuned: float | None  # share of its answers for which it holds
    difference: float | None = None
    low: float | None = None
    high: float | None = None


class Sample(Read):
    """One held-out turn, as it was logged and as both models answer; judged: by the name of the model, then of the rate."""

    conversation: str
    turn: int
    after: str = ""
    question: str
    logged: str
    base: str
    tuned: str
    judged: dict[str, dict[str, bool | None]] = {}


class Generation(Read):
    """Answers to held-out turns."""

    turns: int
    conversations: int
    format: str = ""
    rates: list[Rate] = []
    samples: list[Sample] = []


class Passed(Read):
    """Of the tests of gptme-eval."""

    passed: int


class Test(Read):
    """pass, fail or timeout."""

    test: str
    base: str
    tuned: str


class GptmeEval(Read):
    """What gptme-eval found."""

    suite: str
    tests: int
    base: Passed
    tuned: Passed
    rows: list[Test] = []


class Bootstrap(Read):
    """How the intervals came about."""

    samples: int
    unit: str = "conversation"


class Evaluation(Read):
    """evaluation.json."""

    checkpoint: str
    step: int
    engine: str
    split: str = "valid"
    note: str = ""
    base: Losses
    tuned: Losses
    rows: list[Row] = []
    bootstrap: Bootstrap | None = None
    generation: Generation | None = None
    gptme_eval: GptmeEval | None = None


class Answer(Read):
    """One line of samples.jsonl: what was answered to one of the prompts at one step."""

    step: int
    prompt: int
    conversation: str = ""
    question: str
    logged: str
    answer: str


class Progress(Read):
    """What progress.json says of where a checkpoint comes from."""

    engine: str = ""
    device: str = ""
    data: str = ""  # id of the data set
    model: str = ""  # fingerprint of the base model
    versions: dict[str, str] = {}


class Split(Read):
    """What dataset.json counts of a split."""

    conversations: dict[str, int]
    examples: int
    tokens: int
    learned_tokens: int
    learned_tokens_by_source: dict[str, int]
    learned_turns: int
    exact_turns: int
    served_as_trained: int
    placeholder_tokens: int = 0
    turns_too_long: int = 0
    turns_refused: dict[str, int] = {}
    turns_inexact: dict[str, int] = {}


class Policy(Read):
    """How roles of messages are put."""

    name: str
    what: str
    why: str = ""


class Prepared(Read):
    """dataset.json."""

    id: str
    conversations: str = ""  # digest of the collected files
    max_length: int
    role_policy: Policy
    template_oddities: list[str] = []
    train: Split
    valid: Split
    test: Split
    left_out: dict[str, int] = {}


class Collected(Read):
    """collect.json."""

    found: dict[str, int]
    conversations: dict[str, int]
    assistant_turns: dict[str, int] = {}
    rejected: dict[str, int] = {}
    context_only: dict[str, int] = {}
    secrets: dict[str, int] = {}
    formats: dict[str, int] = {}


Kind = TypeVar("Kind", bound=Read)


def read_as(kind: type[Kind], path: Path, hint: str) -> Kind:
    """Raises UserError where the file is not what it should be."""
    return _checked(kind, read_json(path), str(path), hint)


def read_answers(path: Path) -> list[Answer]:
    """Of samples.jsonl, in order; none where there is no such file. A last line that is still being written is left out."""
    rows = read_rows(path, NEEDED, "samples") if path.is_file() else []
    return [_checked(Answer, row, f"{path}:{number}", "take the line out") for number, row in enumerate(rows, 1)]


def read_losses(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of training and of held-out losses; none of both where the run has not written one yet.

    Raises:
        UserError: a line has not what such a line has.
    """
    rows = read_metrics(path) if path.is_file() and path.stat().st_size else []
    return [row for row in rows if row["split"] == "train"], [row for row in rows if row["split"] == "valid"]


def _checked(kind: type[Kind], value: Any, place: str, hint: str) -> Kind:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "all of it"
        raise UserError(f"{place}: {name}: {first['msg'].lower()}", hint=hint) from error
