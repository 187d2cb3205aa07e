"""How much memory a training run takes, phase by phase, from a model's sizes and the settings: sums, nothing is run.

What is exact (weights, adapter, optimizer) is counted. What an engine holds beside that is a sum of terms, each the
bytes of a family of arrays times a coefficient; the coefficients stand in one place and were fitted to measured peaks
(`benchmarks/plan_memory.py --fit` does it again).
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import ceil
from typing import Literal

from mlx_finetune.config import RunConfig, default
from mlx_finetune.errors import UserError
from mlx_finetune.planning.model_shape import ModelShape

Attention = Literal["fused", "blocks"]
Activations = Literal["float32", "bfloat16", "float16"]
FLOAT32 = 4
LOGITS, FEWEST, MOST = 6 * 2**20, 64, 256  # rows of logits computed together, as engines/mlx/loss.py chooses them
CHUNKS = 2.5  # of such rows that are alive: MLX allocates for the next operations before the last are through (measured)
BLOCK = 256  # of queries, in attention by blocks
SAME_INPUT = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv") | dict.fromkeys(("gate_proj", "up_proj"), "gate_up")
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LEARNED_SHARE = 0.3  # of the tokens, where no data set says it: the assistant's part of agents' conversations


@dataclass(frozen=True)
class Coefficients:
    """Arrays of each family that are alive at the peak. Fitted on MLX's CPU backend, float32; Metal was not measured.

    Starting values: 6-layer cuts of SmolLM2 up to 2,048 tokens (rms 3.4 %), held-out models 2.3 % (facts, section 3).
    """

    # Kept for the backward pass, in each trained layer:
    hidden: float = 4.0  # of the hidden size: what norms read, residuals
    heads: float = 3.0  # of all heads together: queries, attention's output
    kv: float = 2.4  # of keys or values: both
    ffn: float = 5.0  # of the intermediate size: gate, up, activation
    inputs: float = 1.0  # of what enters the adapted matrices, once where they share it
    cast: float = 1.0  # float32 copies of what enters them, one for each, where the model is not in float32
    low: float = 1.0  # x A, rank wide, for each adapted matrix
    scores: float = 1.0  # attention probabilities, [heads, T, T]; none with blocks
    boundary: float = 1.5  # of the hidden size, in each layer that is computed again
    # Alive for a moment, the larger of the two: the layer at work, or the head
    work_hidden: float = 2.5  # of the hidden size
    work_heads: float = 3.0  # of all heads together
    work_kv: float = 2.2  # of keys or values
    work_ffn: float = 4.2  # of the intermediate size
    work_scores: float = 2.0  # of [heads, T, T], with blocks of [heads, 256, T]
    logits: float = 4.3  # of the rows of logits that are alive, float32
    head_hidden: float = 2.4  # of the hidden size, around the head
    # Elsewhere:
    forward: float = 4.0  # of hidden + intermediate size, in a forward pass alone
    forward_logits: float = 2.0  # of the rows of logits in a held-out loss, one chunk after the other
    load: float = 1.5  # of the embeddings as stored, where weights change their dtype as they are loaded


@dataclass(frozen=True)
class Dials:
    """The settings that memory depends on, in the words of RunConfig; `bits` are those of a weight in memory."""

    bits: int  # 32, 16, or quantised to 8 or 4
    max_length: int
    batch_size: int = 1
    num_layers: int | None = None  # the last so many are adapted; None: all
    rank: int = default("rank")
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    dtype: Activations = "bfloat16"  # in which layers compute
    attention: Attention = "blocks"
    grad_checkpoint: int = 0  # 0: keep what the backward pass needs; k: compute every k-th layer once more
    learned_share: float = LEARNED_SHARE

    @property
    def tokens(self) -> int:
        """Read at once: batch size times window."""
        return self.batch_size * self.max_length


@dataclass(frozen=True)
class Memory:
    """Bytes: what stays, what a step adds, and the most that each phase holds."""

    weights: int
    adapter: int  # A and B
    optimizer: int  # two moments
    gradient: int  # the sum over micro-batches, and that of the newest
    activations: int  # kept for the backward pass
    transient: int  # for a moment: the head with its logits, or one layer at work
    phases: Mapping[str, int]  # load, step, update, evaluation
    peak: int


def dials_of(config: RunConfig, shape: ModelShape, learned_share: float = LEARNED_SHARE, on_gpu: bool = True) -> Dials:
    """The dials as a config has them; `auto` as the MLX engine takes it."""
    stored = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[shape.dtype]
    dtype = config.dtype if config.dtype != "auto" else stored if on_gpu else "float32"
    bits = shape.stored_bits if shape.quantisation else 8 * ITEM_BYTES[dtype]
    attention: Attention = (
        "fused" if config.attention == "auto" and on_gpu else "blocks" if config.attention == "auto" else config.attention
    )
    rows = max(config.batch_size, ceil((config.pack_length or 0) / config.max_length))  # a tree may be longer than a micro-batch
    return Dials(
        bits, config.max_length, rows, config.num_layers, config.rank, config.target_modules, dtype,  # type: ignore[arg-type]
        attention, config.grad_checkpoint, learned_share,
    )  # fmt: skip


def memory(shape: ModelShape, dials: Dials, coefficients: Coefficients | None = None) -> Memory:
    """What the run takes.

    Raises:
        UserError: more layers than the model has, or a matrix that it does not have.
    """
    c = coefficients or Coefficients()
    trainable = FLOAT32 * adapter_parameters(shape, dials)
    weights = shape.weight_bytes(dials.bits)
    kept, *momentary = (weigh(terms, c) for terms in step_terms(shape, dials))
    standing = weights + 3 * trainable  # adapter and two moments
    phases = {
        "load": weights + weigh(load_terms(shape, dials), c),
        "step": standing + 2 * trainable + kept + max(momentary),
        "update": standing + (2 + 3) * trainable,  # the new adapter and moments stand beside the old ones
        "evaluation": standing + max(weigh(terms, c) for terms in evaluation_terms(shape, dials)),
    }
    transient = max(momentary)
    return Memory(weights, trainable, 2 * trainable, 2 * trainable, kept, transient, phases, max(phases.values()))


def targets(shape: ModelShape, dials: Dials) -> dict[str, tuple[int, int]]:
    """The adapted matrices of one layer: name -> (out, in)."""
    linears = dict(shape.sizes.linears)
    if dials.target_modules == "all-linear":
        return linears
    for name in dials.target_modules:
        if name not in linears:
            near = difflib.get_close_matches(name, linears, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(linears)}"
            raise UserError(f"target_modules: no matrix of {shape.name} is called {name!r}", hint=hint)
    return {name: linears[name] for name in dials.target_modules}


def trained_layers(shape: ModelShape, dials: Dials) -> int:
    """How many layers have an adapter.

    Raises:
        UserError: more than there are.
    """
    layers = shape.sizes.layers
    if dials.num_layers and dials.num_layers > layers:
        raise UserError(f"num_layers = {dials.num_layers}: {shape.name} has {layers}", hint="leave it out to adapt all")
    return dials.num_layers or layers


def recomputed_layers(shape: ModelShape, dials: Dials) -> int:
    """How many of the trained layers are computed once more in the backward pass."""
    return ceil(trained_layers(shape, dials) / dials.grad_checkpoint) if dials.grad_checkpoint else 0


def adapter_parameters(shape: ModelShape, dials: Dials) -> int:
    """Parameters of A [rank, in] and B [out, rank] of all adapted matrices."""
    in_layer = sum(rows + columns for rows, columns in targets(shape, dials).values())
    return trained_layers(shape, dials) * dials.rank * in_layer


def weigh(terms: Mapping[str, float], c: Coefficients) -> int:
    """Bytes: each term times the coefficient of its name."""
    return int(sum(getattr(c, name) * value for name, value in terms.items()))


def step_terms(shape: ModelShape, dials: Dials) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Bytes by coefficient: kept for the backward pass, alive around the head, alive in a layer."""
    sizes, item, layers = shape.sizes, ITEM_BYTES[dials.dtype], trained_layers(shape, dials)
    again = recomputed_layers(shape, dials)
    in_layer = _kept_in_layer(shape, dials)
    kept = {name: (layers - again) * value for name, value in in_layer.items()}
    alive = min(CHUNKS * head_rows(shape), max(1.0, dials.learned_share * dials.tokens))
    head = {"logits": alive * sizes.vocabulary * FLOAT32, "head_hidden": float(dials.tokens * sizes.hidden * item)}
    at_work = {f"work_{name}": float(dials.tokens * count * item) for name, count in _widths(shape).items()}
    at_work["work_scores"] = float(_scores(shape, dials))
    if again:
        kept["boundary"] = float(again * dials.tokens * sizes.hidden * item)
        at_work |= in_layer
    return kept, head, at_work


def evaluation_terms(shape: ModelShape, dials: Dials) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes by coefficient in a forward pass: around the head, in a layer."""
    sizes, item = shape.sizes, ITEM_BYTES[dials.dtype]
    rows = min(head_rows(shape), max(1.0, dials.learned_share * dials.tokens))
    head = {"forward_logits": rows * sizes.vocabulary * FLOAT32}
    return head, {
        "forward": float(dials.tokens * (sizes.hidden + sizes.intermediate) * item),
        "work_scores": float(_scores(shape, dials)),
    }


def head_rows(shape: ModelShape) -> int:
    """Learned tokens whose logits are computed together."""
    return min(max(LOGITS // shape.sizes.vocabulary, FEWEST), MOST)


def load_terms(shape: ModelShape, dials: Dials) -> dict[str, float]:
    """Bytes by coefficient while weights are loaded."""
    changes = not shape.quantisation and dials.bits in (16, 32) and dials.bits != shape.stored_bits
    return {"load": shape.sizes.vocabulary * shape.sizes.hidden * shape.stored_bits / 8} if changes else {}


def trunk_cache_bytes(shape: ModelShape, tokens: int) -> int:
    """On disk, where the frozen layers are computed once: what enters the first trained layer, 16 bits a number."""
    return tokens * shape.sizes.hidden * 2


def coefficient_names() -> tuple[str, ...]:
    """Of all coefficients, in order."""
    return tuple(field.name for field in fields(Coefficients))


def _kept_in_layer(shape: ModelShape, dials: Dials) -> dict[str, float]:
    """Bytes by coefficient that the backward pass of one trained layer needs."""
    item, adapted = ITEM_BYTES[dials.dtype], targets(shape, dials)
    terms = {name: float(dials.tokens * count * item) for name, count in _widths(shape).items()}
    entering = {SAME_INPUT.get(name, name): columns for name, (_, columns) in adapted.items()}
    terms["inputs"] = float(dials.tokens * sum(entering.values()) * item)
    terms["low"] = float(dials.tokens * dials.rank * len(adapted) * FLOAT32)
    if item != FLOAT32:
        terms["cast"] = float(dials.tokens * sum(columns for _, columns in adapted.values()) * FLOAT32)
    if dials.attention == "fused":
        terms["scores"] = float(_scores(shape, dials))
    return terms


def _widths(shape: ModelShape) -> dict[str, float]:
    """Numbers of one token in arrays of each family."""
    sizes = shape.sizes
    return {
        "hidden": sizes.hidden,
        "heads": sizes.heads * sizes.head_dim,
        "kv": sizes.kv_heads * sizes.head_dim,
        "ffn": sizes.intermediate * (1 if sizes.gated else 0.75),  # without a gate three arrays of four
    }


def _scores(shape: ModelShape, dials: Dials) -> int:
    """Bytes of the attention scores of one layer that exist at once."""
    rows = min(BLOCK, dials.max_length) if dials.attention == "blocks" else dials.max_length
    return dials.batch_size * shape.sizes.heads * rows * dials.max_length * ITEM_BYTES[dials.dtype]
