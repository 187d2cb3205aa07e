"""Which settings fit into a machine, and why these: quality is given up last, in a fixed order.

First what costs only time (attention by blocks, layers computed twice), then bits of the weights (16, 8, 4), then the
length of the windows, then the number of layers that learn. More memory therefore never gives a worse plan.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mlx_finetune.config import default
from mlx_finetune.errors import UserError
from mlx_finetune.planning.machine import GIB, Machine
from mlx_finetune.planning.memory import Activations, Dials, Memory, memory
from mlx_finetune.planning.model_shape import ModelShape

MARGIN = 1.25  # on all but the weights, where the worst prediction measured was 18 % too low (benchmarks/plan_memory.py)
SHORTEST = 1024  # tokens; a shorter window holds too little of an agent's conversation
FEWER_LAYERS = (16, 8, 4)
BITS = (16, 8, 4)
EVERY = (4, 2, 1)  # so many-th layer is computed again: from little time to much
STEP_TOKENS = 4096  # a micro-batch of more is no faster
EXAMPLES = default("batch_size") * default("gradient_accumulation")  # in a step


@dataclass(frozen=True)
class Wanted:
    """What would be trained if memory were no matter."""

    max_length: int
    learned_share: float
    rank: int = default("rank")


@dataclass(frozen=True)
class Choice:
    """The best settings that fit, or, where none do, the smallest ones that there are."""

    dials: Dials
    memory: Memory
    fits: bool
    rank: int  # how much had to be given up: 0 is nothing


def needed(found: Memory) -> int:
    """Bytes to set aside for it: the prediction with its margin."""
    return int(found.weights + MARGIN * (found.peak - found.weights))


def choose(shape: ModelShape, machine: Machine, wanted: Wanted) -> Choice:
    """The first of the candidates that fits, its micro-batch then made as large as is of use."""
    for rank, dials in enumerate(candidates(shape, machine, wanted)):
        found = memory(shape, dials)
        if needed(found) <= machine.usable:
            dials = _larger_batch(shape, machine, dials)
            return Choice(dials, memory(shape, dials), True, rank)
    return Choice(dials, found, False, rank)


def candidates(shape: ModelShape, machine: Machine, wanted: Wanted) -> Iterator[Dials]:
    """Settings from the best to the smallest, one row at once."""
    length = min(wanted.max_length, shape.sizes.longest or wanted.max_length)
    bits = _bits(shape, machine)
    start = Dials(bits[0], length, rank=wanted.rank, dtype=activations(shape, machine, bits[0]), learned_share=wanted.learned_share)
    for each in bits:
        yield from _slower(replace(start, bits=each, dtype=activations(shape, machine, each)), machine.on_gpu)
    start = replace(start, bits=bits[-1], dtype=activations(shape, machine, bits[-1]))
    while start.max_length > SHORTEST:
        start = replace(start, max_length=max(SHORTEST, start.max_length // 2))
        yield from _slower(start, machine.on_gpu)
    for layers in FEWER_LAYERS:
        if layers < shape.sizes.layers:
            yield from _slower(replace(start, num_layers=layers), machine.on_gpu)


def activations(shape: ModelShape, machine: Machine, bits: int) -> Activations:
    """The dtype in which layers compute: float32 on a CPU and for 32 bits; on a Mac as stored, and in bfloat16 for float32."""
    if not machine.on_gpu or bits == 32 or (shape.quantisation and shape.dtype == "F32"):
        return "float32"
    return "float16" if shape.dtype == "F16" else "bfloat16"


def refuse_what_cannot_fit(shape: ModelShape, dials: Dials, machine: Machine) -> None:
    """Before a run starts.

    Raises:
        UserError: it needs more than the machine has to give; the hint names the knob that is turned first.
    """
    found = memory(shape, dials)
    if needed(found) <= machine.usable:
        return
    message = f"{shape.name}: the run needs {gb(needed(found))}, {gb(machine.usable)} may be used ({machine.rule})"
    raise UserError(message, hint=_knob(shape, dials, machine))


def gb(count: float) -> str:
    """Bytes as a Mac says them."""
    return f"{count / GIB:.1f} GB" if count >= GIB / 10 else f"{count / GIB * 1024:.0f} MB"


def _knob(shape: ModelShape, dials: Dials, machine: Machine) -> str:
    shorter = [length for length in (dials.max_length // 2, dials.max_length // 4) if length >= SHORTEST]
    changes: list[dict[str, object]] = [{"batch_size": 1}] if dials.batch_size > 1 else []
    changes += [{"attention": "blocks"}] if dials.attention == "fused" else []
    changes += [{"attention": "blocks", "grad_checkpoint": 1}] if not dials.grad_checkpoint else []
    changes += [{"max_length": length} for length in shorter]
    changes += [{"num_layers": layers} for layers in FEWER_LAYERS if layers < (dials.num_layers or shape.sizes.layers)]
    turned: dict[str, object] = {}
    for change in changes:  # one after the other, and all of them kept
        turned |= change
        if needed(memory(shape, replace(dials, **turned))) <= machine.usable:  # type: ignore[arg-type]
            return f"set {', '.join(f'{name}={value}' for name, value in turned.items())}; or see mlx-finetune plan"
    return "no setting makes it fit: take a smaller or a quantised model (mlx-finetune plan says which fits)"


def _bits(shape: ModelShape, machine: Machine) -> tuple[int, ...]:
    if shape.quantisation:
        return (shape.stored_bits,)
    return BITS if machine.on_gpu else (32,)  # packed weights are no way out on a CPU: their products take forty times as long


def _slower(dials: Dials, on_gpu: bool) -> Iterator[Dials]:
    """The same learned in less memory and more time; on a CPU blocks are the faster ones too."""
    if on_gpu:
        yield replace(dials, attention="fused")
    yield replace(dials, attention="blocks")
    for every in EVERY:
        yield replace(dials, attention="blocks", grad_checkpoint=every)


def _larger_batch(shape: ModelShape, machine: Machine, dials: Dials) -> Dials:
    larger = replace(dials, batch_size=2 * dials.batch_size)
    if larger.tokens > STEP_TOKENS or larger.batch_size > EXAMPLES or needed(memory(shape, larger)) > machine.usable:
        return dials
    return _larger_batch(shape, machine, larger)
