"""What an evaluation is asked for."""

from dataclasses import dataclass

from mlx_finetune.road import Evaluate

TURNS, LIMIT = int(Evaluate.default("answers")), int(Evaluate.default("tokens"))
SECONDS, STEPS = 600, 20  # of gptme-eval: for one test, and answers of the model in it, unless told otherwise
SEED = 0


@dataclass(frozen=True)
class Wanted:
    """What is measured: on `split`, with answers to up to `generate` turns of at most `limit` tokens each."""

    split: str = "valid"
    generate: int = 0
    limit: int = LIMIT
    seed: int = SEED  # of the bootstrap


LOSSES = Wanted()  # and no answers
