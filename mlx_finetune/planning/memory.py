"""How much memory a training run takes, phase by phase, from a model's sizes and the settings: sums, nothing is run.

What is exact (weights, adapter, optimizer) is counted. What an engine holds beside that is a sum of terms, each the
bytes of a family of arrays times a coefficient; the coefficients stand in one place and were fitted to measured peaks
(`benchmarks/plan_memory.py --fit` does it again).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import ceil
from typing import Literal

from mlx_finetune.config import RunConfig, default
from mlx_finetune.errors import UserError
from mlx_finetune.nearest import did_you_mean
from mlx_finetune.planning.model_shape import ModelShape

Attention = Literal["fused", "blocks"]
Activations = Literal["float32", "bfloat16", "float16"]
FLOAT32 = 4
LOGITS, FEWEST, MOST = 3 * 2**20, 64, 256  # rows of logits computed together, as engines/mlx/loss.py chooses them
# MLX allocates for some ten operations to come before the last are through (inferred from peaks, which repeat to the byte), so more
# than one chunk of logits, and more than one matrix of a file, are there at once.
AHEAD = 10
CHUNKS, CHUNKS_AGAIN = 2.0, 1.25  # of rows of logits; where layers are computed again (measured)
SCORES, FEWEST_QUERIES, BLOCK = 2**20, 64, 256  # in attention by blocks, as engines/mlx/attention.py cuts them
SAME_INPUT = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv") | dict.fromkeys(("gate_proj", "up_proj"), "gate_up")
FUSED = ("qkv_proj", "Wqkv", "gate_up_proj")
WIDTHS = ("hidden", "heads", "kv", "ffn")
KEPT = (*WIDTHS, "inputs", "low", "scores", "boundary")
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LEARNED_SHARE = 0.3  # of the tokens, where no data set says it: the assistant's part of agents' conversations


@dataclass(frozen=True)
class Coefficients:
    """How many arrays of a family are alive at the peak. Fitted on MLX's CPU backend by `benchmarks/plan_memory.py --fit`.

    Metal was not measured: it frees and fuses otherwise, so the real peak is likely to lie below.
    """

    # Kept for the backward pass, in each trained layer that is not computed again:
    hidden: float = 1.538  # of the hidden size: what norms read, residuals
    heads: float = 2.893  # of all heads together: queries, attention's output
    kv: float = 3.708  # of keys or values: both
    ffn: float = 1.809  # of the intermediate size: gate, up, activation
    inputs: float = 0.938  # of what enters the adapted matrices, once where they share it
    low: float = 0.915  # x A, rank wide, for each adapted matrix
    scores: float = 0.998  # attention probabilities, [heads, T, T]; none with blocks
    boundary: float = 2.01  # of the hidden size, in each layer that is computed again
    gradient: float = 0.727  # of the adapter, fresh
    # Alive for a moment at the top of the layers, where the backward pass begins:
    work_hidden: float = 2.968
    work_heads: float = 4.359
    work_ffn: float = 7.365
    work_scores: float = 2.065  # of [heads, T, T], with blocks of the scores that are there at once
    # In a layer further down that is computed again, everything of it:
    again_hidden: float = 2.507
    again_heads: float = 2.507
    again_kv: float = 2.507
    again_ffn: float = 4.052
    again_scores: float = 3.314
    again_fused: float = 6.365  # of what matrices fused of several give, such as gate_up_proj: it is cut apart
    # At the head:
    logits: float = 3.998  # of the rows of logits that are there, float32
    head_hidden: float = 3.648
    # In a forward pass alone, the larger of head and layer:
    forward_logits: float = 3.215  # of one chunk of rows
    forward_hidden: float = 2.72
    forward_ffn: float = 5.951
    forward_scores: float = 0.988
    forward_fused: float = 0.754
    # Where weights change their dtype as they are loaded:
    load: float = 1.1  # of embeddings, head, and the next matrices, as stored


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
    gradient: int  # the sum over micro-batches
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
        "fused" if config.attention in ("fused", "flash") or (config.attention == "auto" and on_gpu) else "blocks"
    )
    known = isinstance(config.target_modules, tuple) and all(name in shape.sizes.linears for name in config.target_modules)
    targets = config.target_modules if known else "all-linear"  # a pattern, paths or embeddings: as if all were adapted
    rows = max(config.batch_size, ceil((config.pack_length or 0) / config.max_length))  # a tree may be longer than a micro-batch
    return Dials(
        bits, config.max_length, rows, config.num_layers, config.rank, targets, dtype,  # type: ignore[arg-type]
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
    fullest = max(step_terms(shape, dials), key=lambda terms: weigh(terms, c))
    kept = weigh({name: value for name, value in fullest.items() if name in KEPT}, c)
    transient = weigh(fullest, c) - kept
    standing = weights + 3 * trainable  # adapter and two moments
    phases = {
        "load": weights + trainable + weigh(load_terms(shape, dials), c),
        "step": standing + trainable + kept + transient,  # the sum of the micro-batches before
        "update": standing + (2 + 3) * trainable,  # the new adapter and moments stand beside the old ones
        "evaluation": standing + max(weigh(terms, c) for terms in evaluation_terms(shape, dials)),
    }
    return Memory(weights, trainable, 2 * trainable, trainable, kept, transient, phases, max(phases.values()))


def targets(shape: ModelShape, dials: Dials) -> dict[str, tuple[int, int]]:
    """The adapted matrices of one layer: name -> (out, in)."""
    linears = dict(shape.sizes.linears)
    if dials.target_modules == "all-linear":
        return linears
    for name in dials.target_modules:
        if name not in linears:
            hint = did_you_mean(name, linears, f"it has {', '.join(linears)}")
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


def step_terms(shape: ModelShape, dials: Dials) -> list[dict[str, float]]:
    """Bytes by coefficient in each place where the peak may be: the head, the top layer, the next one computed again."""
    layers, every, again = trained_layers(shape, dials), dials.grad_checkpoint, recomputed_layers(shape, dials)
    layer, boundary = _kept_in_layer(shape, dials), _of_tokens(shape, dials, "hidden")
    everything = _times(layer, layers - again) | {"boundary": again * boundary}
    everything["gradient"] = float(FLOAT32 * adapter_parameters(shape, dials))
    scores = float(_scores(shape, dials))
    chunks = (CHUNKS_AGAIN if again else CHUNKS) * head_rows(shape)
    head = {"logits": _logits(shape, dials, chunks), "head_hidden": boundary}
    work = {f"work_{name}": _of_tokens(shape, dials, name) for name in ("hidden", "heads", "ffn")} | {"work_scores": scores}
    top_again = bool(every) and (layers - 1) % every == 0
    places = [everything | head, _plus(everything, layer if top_again else {}) | work]
    if again and layers > 1:
        at = every * ((layers - 2) // every)  # the next layer below the top that is computed again
        below = ceil(at / every)  # how many are computed again below it
        inside = {f"again_{name}": _of_tokens(shape, dials, name) for name in WIDTHS} | {"again_scores": scores}
        inside["again_fused"] = _fused(shape, dials)
        left = {"boundary": (below + 1) * boundary, "gradient": everything["gradient"]}
        places.append(_plus(_times(layer, at - below), inside | left))
    return places


def evaluation_terms(shape: ModelShape, dials: Dials) -> list[dict[str, float]]:
    """Bytes by coefficient in a forward pass: at the head, in a layer."""
    layer = {f"forward_{name}": _of_tokens(shape, dials, name) for name in ("hidden", "ffn")}
    layer |= {"forward_scores": float(_scores(shape, dials)), "forward_fused": _fused(shape, dials)}
    return [{"forward_logits": _logits(shape, dials, head_rows(shape))}, layer]


def _times(terms: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: factor * value for name, value in terms.items()}


def _plus(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in one.keys() | other.keys()}


def head_rows(shape: ModelShape) -> int:
    """Learned tokens whose logits are computed together."""
    return min(max(LOGITS // shape.sizes.vocabulary, FEWEST), MOST)


def load_terms(shape: ModelShape, dials: Dials) -> dict[str, float]:
    """Bytes by coefficient while weights are loaded."""
    if shape.quantisation or dials.bits not in (16, 32) or dials.bits == shape.stored_bits:
        return {}
    largest = max(rows * columns for rows, columns in shape.sizes.linears.values())
    return {"load": (shape.embeddings + AHEAD * largest) * shape.stored_bits / 8}


def trunk_cache_bytes(shape: ModelShape, dials: Dials, tokens: int) -> int:
    """On disk, where the frozen layers are computed once: what enters the first trained layer."""
    return tokens * shape.sizes.hidden * ITEM_BYTES[dials.dtype]


def coefficient_names() -> tuple[str, ...]:
    """Of all coefficients, in order."""
    return tuple(field.name for field in fields(Coefficients))


def _kept_in_layer(shape: ModelShape, dials: Dials) -> dict[str, float]:
    """Bytes by coefficient that the backward pass of one trained layer needs."""
    item, adapted = ITEM_BYTES[dials.dtype], targets(shape, dials)
    terms = {name: _of_tokens(shape, dials, name) for name in WIDTHS}
    entering = {SAME_INPUT.get(name, name): columns for name, (_, columns) in adapted.items()}
    terms["inputs"] = float(dials.tokens * sum(entering.values()) * item)
    terms["low"] = float(dials.tokens * dials.rank * len(adapted) * FLOAT32)
    if dials.attention == "fused":
        terms["scores"] = float(_scores(shape, dials))
    return terms


def _of_tokens(shape: ModelShape, dials: Dials, name: str) -> float:
    """Bytes of one array of a family of WIDTHS."""
    sizes = shape.sizes
    width = {
        "hidden": sizes.hidden,
        "heads": sizes.heads * sizes.head_dim,
        "kv": sizes.kv_heads * sizes.head_dim,
        "ffn": sizes.intermediate * (1 if sizes.gated else 0.75),  # without a gate three arrays of four
    }[name]
    return dials.tokens * width * ITEM_BYTES[dials.dtype]


def _fused(shape: ModelShape, dials: Dials) -> float:
    """Bytes of what the matrices give that are fused of several."""
    rows = sum(rows for name, (rows, _) in shape.sizes.linears.items() if name in FUSED)
    return float(dials.tokens * rows * ITEM_BYTES[dials.dtype])


def _logits(shape: ModelShape, dials: Dials, rows: float) -> float:
    """Bytes of so many rows, or of all that are learned where they are fewer."""
    return min(rows, max(1.0, dials.learned_share * dials.tokens)) * shape.sizes.vocabulary * FLOAT32


def _scores(shape: ModelShape, dials: Dials) -> int:
    """Bytes of the attention scores of one layer that exist at once."""
    heads, rows = dials.batch_size * shape.sizes.heads, dials.max_length
    if dials.attention == "blocks":
        fitting = SCORES // (heads * dials.max_length) // FEWEST_QUERIES * FEWEST_QUERIES
        rows = min(rows, BLOCK, max(fitting, FEWEST_QUERIES))
    return heads * rows * dials.max_length * ITEM_BYTES[dials.dtype]
