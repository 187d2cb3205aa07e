"""Models to begin with, from small to large, and which of them a machine takes: known without a network.

Chosen for their chat templates, which keep what gptme sends and need no role policy, and for their licences (Apache 2.0).
Sizes are those of each config.json as published; tests count them to the published number of parameters. How well one drives
gptme was not compared.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_finetune.config import default
from mlx_finetune.nearest import nearest
from mlx_finetune.planning.advice import Choice, Wanted, choose
from mlx_finetune.planning.machine import Machine
from mlx_finetune.planning.memory import LEARNED_SHARE
from mlx_finetune.planning.model_shape import ModelShape, shape_of
from mlx_finetune.planning.speed import Speed, expected_speed

PACKED = "mlx-community"  # has each of them quantised by MLX to 8 and 4 bits, but the smallest
NUMBERS = re.compile(r"\d+")
NEAR = 0.8  # of difflib's ratio: ids are long, and alike in most of their letters
PATIENCE = 24.0  # hours; a longer first run is no default
PASS = 1_000_000  # tokens, where nobody's logs are known
QWEN2 = {"model_type": "qwen2", "max_position_embeddings": 32768, "torch_dtype": "bfloat16"}
SMALL = {"model_type": "llama", "max_position_embeddings": 8192, "torch_dtype": "bfloat16", "tie_word_embeddings": True}
KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
# Hub id, the sizes in the order of KEYS, and what else its config.json has.
ROWS: tuple[tuple[str, tuple[int, ...], Mapping[str, Any]], ...] = (
    ("HuggingFaceTB/SmolLM2-135M-Instruct", (576, 30, 9, 3, 1536, 49152), SMALL),
    ("HuggingFaceTB/SmolLM2-360M-Instruct", (960, 32, 15, 5, 2560, 49152), SMALL),
    ("Qwen/Qwen2.5-Coder-1.5B-Instruct", (1536, 28, 12, 2, 8960, 151936), QWEN2 | {"tie_word_embeddings": True}),
    (
        "Qwen/Qwen3-4B-Instruct-2507",
        (2560, 36, 32, 8, 9728, 151936),
        QWEN2 | {"model_type": "qwen3", "head_dim": 128, "max_position_embeddings": 262144, "tie_word_embeddings": True},
    ),
    ("Qwen/Qwen2.5-Coder-7B-Instruct", (3584, 28, 28, 4, 18944, 152064), QWEN2),
    ("Qwen/Qwen2.5-Coder-14B-Instruct", (5120, 48, 40, 8, 13824, 152064), QWEN2),
    ("Qwen/Qwen2.5-Coder-32B-Instruct", (5120, 64, 40, 8, 27648, 152064), QWEN2),
)
UNPACKED = ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct")


@dataclass(frozen=True)
class Candidate:
    """A model on a machine: the best settings for it there, and tokens in a second where the machine's speed is known."""

    shape: ModelShape
    choice: Choice
    speed: Speed | None

    @property
    def whole(self) -> bool:
        """Fits with all layers learning and with windows of the usual length."""
        dials = self.choice.dials
        return self.choice.fits and dials.num_layers is None and dials.max_length >= min(default("max_length"), self._longest)

    @property
    def _longest(self) -> int:
        return self.shape.sizes.longest or default("max_length")

    @property
    def packed(self) -> str:
        """The hub id of its weights quantised by MLX as the plan has them; empty where it takes them as they are."""
        if self.choice.dials.bits >= 16 or self.shape.name in UNPACKED:
            return ""
        return f"{PACKED}/{self.shape.name.partition('/')[2]}-{self.choice.dials.bits}bit"


def known_shapes() -> list[ModelShape]:
    """Of all rows, from small to large."""
    base: dict[str, Any] = {"tie_word_embeddings": False}
    return [shape_of(base | dict(zip(KEYS, sizes, strict=True)) | dict(other), name, ()) for name, sizes, other in ROWS]


def near_model(name: str) -> str | None:
    """The Hub id nearest to `name` of those that are known here: of the rows, as MLX packs them too, and in the Hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    rows = [row[0] for row in ROWS]
    packed = [f"{PACKED}/{row.partition('/')[2]}-{bits}bit" for row in rows for bits in (4, 8)]
    cached = [path.name.removeprefix("models--").replace("--", "/", 1) for path in Path(HF_HUB_CACHE).glob("models--*--*")]
    sizes = NUMBERS.findall(name)  # another size or version may well be on the Hub
    return nearest(name, [known for known in (*rows, *packed, *cached) if NUMBERS.findall(known) == sizes], NEAR)


def candidate(shape: ModelShape, machine: Machine) -> Candidate:
    """The model on this machine."""
    choice = choose(shape, machine, Wanted(default("max_length"), LEARNED_SHARE))
    speed = expected_speed(shape, choice.dials, choice.dials.max_length, machine) if choice.fits else None
    return Candidate(shape, choice, speed)


def candidates(machine: Machine) -> list[Candidate]:
    """All rows on this machine, from small to large."""
    return [candidate(shape, machine) for shape in known_shapes()]


def advised(found: Sequence[Candidate], machine: Machine, tokens: int = PASS) -> Candidate | None:
    """The largest that is whole and learns so many tokens within a day; without a GPU the smallest; None where none fits."""
    fitting = [one for one in found if one.choice.fits]
    if not machine.on_gpu:
        return fitting[0] if fitting else None
    soon = [one for one in fitting if one.whole and (one.speed is None or one.speed.hours(tokens)[1] <= PATIENCE)]
    return soon[-1] if soon else fitting[0] if fitting else None
