"""How long a run takes: operations and bytes of a token over what the machine does in a second (a roofline).

Utilisation is the share of a GPU's peak that training reaches. Published LoRA runs with MLX (facts, section 4): Mistral-7B
on M1 Max 39 %, on M2 Air 34 % (short padded rows); reading a prompt, which is matrix products alone, 70 to 75 %.
"""

from dataclasses import dataclass
from pathlib import Path

from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.planning.machine import Machine
from mlx_finetune.planning.memory import (
    BLOCK,
    ITEM_BYTES,
    Dials,
    memory,
    recomputed_layers,
    trained_layers,
)
from mlx_finetune.planning.model_shape import ModelShape

UTILISATION = (0.35, 0.45, 0.60)  # of the peak: low, likely, high
MOVED = 10.0  # times that an array kept for the backward pass travels: 62 MB a token for Mistral-7B, all layers (facts)
QUANTISED = 0.9  # speed of a product with packed weights beside one in 16 bits: 1,622 to 1,780 tokens/s (M4 Max, Qwen3-4B)
SCORE_PRODUCTS = (2, 5)  # matrix products of attention, forward and backward


@dataclass(frozen=True)
class Data:
    """What is to be learned from: a data set's training split, or a million tokens where there is none."""

    tokens: int
    learned: int
    examples: int
    longest: int  # max_length that it was prepared with
    named: str  # "" where it is nobody's

    @property
    def learned_share(self) -> float:
        """Of its tokens."""
        return self.learned / self.tokens

    @property
    def usual_length(self) -> int:
        """Tokens of an example, on average."""
        return max(1, self.tokens // self.examples)


@dataclass(frozen=True)
class Work:
    """Of one token read: floating-point operations (a multiplication and an addition are two), and bytes moved."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class Speed:
    """Tokens read in a second: low, likely, high; all the same where they were measured."""

    low: float
    likely: float
    high: float
    measured: bool

    def hours(self, tokens: float) -> tuple[float, float, float]:
        """For so many tokens: fewest, likely, most."""
        few, likely, most = (tokens / rate / 3600 for rate in (self.high, self.likely, self.low))
        return few, likely, most


def data_of(folder: str) -> Data:
    """The training split of a prepared folder, from its dataset.json alone.

    Raises:
        UserError: not a prepared folder, or one with nothing to train on.
    """
    place = Path(folder) / "dataset.json"
    if not place.is_file():
        raise UserError(f"{folder}: not a prepared data set (no dataset.json)", hint="mlx-finetune prepare makes one")
    info = read_json(place)
    try:
        train = info["train"]
        tokens, learned, examples = (int(train[name]) for name in ("tokens", "learned_tokens", "examples"))
        longest = int(info["max_length"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place}: no counts of tokens in it", hint="run mlx-finetune prepare again") from error
    if min(tokens, learned, examples, longest) < 1:
        raise UserError(f"{place}: nothing to train on", hint="run mlx-finetune prepare with other conversations")
    return Data(tokens, learned, examples, longest, folder)


def work_of_token(shape: ModelShape, dials: Dials, length: float) -> Work:
    """What training does for one token of an example of `length` tokens.

    The weights are frozen: no gradient of theirs is computed, and below the first trained layer there is no backward pass.
    """
    sizes, trained = shape.sizes, trained_layers(shape, dials)
    width = sizes.heads * sizes.head_dim
    seen = (length + min(BLOCK, length)) / 2 if dials.attention == "blocks" else length  # "fused" computes the upper triangle too
    matrices, product = 2.0 * shape.layer_matrices, 2.0 * width * seen
    forward = matrices + SCORE_PRODUCTS[0] * product
    scores_again = product if dials.attention == "blocks" else 0.0
    backward = matrices + SCORE_PRODUCTS[1] * product + scores_again
    head = 2 * 2.0 * sizes.hidden * sizes.vocabulary * dials.learned_share
    operations = (sizes.layers + recomputed_layers(shape, dials)) * forward + trained * backward + head
    return Work(operations, _bytes_of_token(shape, dials, length))


def expected_speed(shape: ModelShape, dials: Dials, length: float, machine: Machine) -> Speed | None:
    """From the table of chips; None where the machine is not in it."""
    if machine.chip is None:
        return None
    work, peak = work_of_token(shape, dials, length), machine.chip.tflops * 1e12 * (QUANTISED if dials.bits < 16 else 1)
    moving = work.bytes / (machine.chip.bandwidth * 1e9)
    low, likely, high = (1 / (work.operations / (peak * share) + moving) for share in UTILISATION)
    return Speed(low, likely, high, measured=False)


def calibrated_speed(shape: ModelShape, dials: Dials, length: float, operations_per_second: float) -> Speed:
    """From what a run on the machine reached (`calibrate`)."""
    rate = operations_per_second / work_of_token(shape, dials, length).operations
    return Speed(rate, rate, rate, measured=True)


def _bytes_of_token(shape: ModelShape, dials: Dials, length: float) -> float:
    """Arrays between the products, and the weights, which are read three times a micro-batch."""
    one = Dials(
        dials.bits, max(1, round(length)), 1, None, dials.rank, dials.target_modules, dials.dtype, "blocks", 0, dials.learned_share
    )
    in_all = memory(shape, one).activations / one.tokens
    share = (1 + 2 * trained_layers(shape, dials) / shape.sizes.layers) / 3  # frozen layers: forward only
    weights = 3 * shape.weight_bytes(dials.bits) / (dials.batch_size * max(1.0, length))
    return MOVED * in_all * share + weights + 2 * shape.sizes.hidden * ITEM_BYTES[dials.dtype]
