"""A plan in sentences that need no knowledge of machine learning."""

from collections.abc import Iterator
from dataclasses import replace

from mlx_finetune.planning.advice import Choice, Wanted, gb, needed
from mlx_finetune.planning.machine import Machine
from mlx_finetune.planning.memory import Dials, memory, recomputed_layers, trunk_cache_bytes
from mlx_finetune.planning.model_shape import ModelShape
from mlx_finetune.planning.speed import Data, Speed, work_of_token

WORDS_A_TOKEN = 0.75  # of English
LONG = 48  # hours


def reasons(shape: ModelShape, machine: Machine, choice: Choice, wanted: Wanted, data: Data | None) -> tuple[str, ...]:
    """Why these settings and no others, a sentence each."""
    if not choice.fits:
        return tuple(_too_large(shape, machine, choice))
    parts = (_bits, _window, _rows, _attention, _again, _layers)
    sentences = [part(shape, machine, choice.dials, wanted) for part in parts]
    if data:
        sentences += list(_of_data(shape, choice.dials, data))
    return tuple(filter(None, sentences))


def duration(speed: Speed | None, tokens: float) -> str:
    """How long so many tokens take: `about 9 hours (7 to 12)`."""
    if speed is None:
        return "not known"
    few, likely, most = speed.hours(tokens)
    if most < 1 / 60:
        return "less than a minute"
    unit, size = ("days", 24) if likely > LONG else ("hours", 1) if likely >= 1 else ("minutes", 1 / 60)
    few, likely, most = few / size, likely / size, most / size
    return f"about {likely:.2g} {unit}" if speed.measured else f"about {likely:.2g} {unit} ({few:.2g} to {most:.2g})"


def _too_large(shape: ModelShape, machine: Machine, choice: Choice) -> Iterator[str]:
    d = choice.dials
    layers = f" and the last {d.num_layers} layers learning" if d.num_layers else ""
    yield (
        f"it does not fit: with {d.bits} bits a weight, windows of {d.max_length:,} tokens{layers} it still needs"
        f" {gb(needed(choice.memory))}, and {gb(machine.usable)} may be used"
    )
    yield "take a model with fewer parameters, or a machine with more memory"


def _bits(shape: ModelShape, machine: Machine, dials: Dials, wanted: Wanted) -> str:
    if shape.quantisation:
        return f"weights in {dials.bits} bits: the model is stored so ({gb(shape.weight_bytes())})"
    if not machine.on_gpu:
        return f"weights in 32 bits: a CPU is slow with any other ({gb(shape.weight_bytes(32))})"
    if dials.bits == 16:
        return f"weights in 16 bits, all that the model knows: {gb(shape.weight_bytes(16))}"
    more = 2 * dials.bits
    full = memory(shape, replace(dials, bits=more, max_length=wanted.max_length, num_layers=None, grad_checkpoint=1, batch_size=1))
    return (
        f"weights in {dials.bits} bits: {gb(shape.weight_bytes(dials.bits))} instead of {gb(shape.weight_bytes(16))}, for a little"
        f" quality; with {more} bits it would need {gb(needed(full))} and {gb(machine.usable)} may be used"
    )


def _window(shape: ModelShape, machine: Machine, dials: Dials, wanted: Wanted) -> str:
    words = round(dials.max_length * WORDS_A_TOKEN, -2)
    told = f"windows of {dials.max_length:,} tokens (max_length), some {words:,.0f} words of a conversation at once"
    if dials.max_length == wanted.max_length:
        return told
    if dials.max_length == shape.sizes.longest and wanted.max_length > dials.max_length:
        return f"{told}: the model reads no longer ones, or MLX not exactly"
    longer = memory(shape, replace(dials, max_length=2 * dials.max_length, batch_size=1, num_layers=None, grad_checkpoint=1))
    return f"{told}: twice as long would need {gb(needed(longer))}"


def _rows(shape: ModelShape, machine: Machine, dials: Dials, wanted: Wanted) -> str:
    if dials.batch_size == 1:
        return ""
    return f"{dials.batch_size} windows at once (batch_size): there is room, and short windows go faster together"


def _attention(shape: ModelShape, machine: Machine, dials: Dials, wanted: Wanted) -> str:
    if dials.attention == "fused":
        return ""
    other = memory(shape, replace(dials, attention="fused"))
    return (
        f"attention by blocks: the same numbers a few at a time, {gb(needed(memory(shape, dials)))} instead of {gb(needed(other))}"
    )


def _again(shape: ModelShape, machine: Machine, dials: Dials, wanted: Wanted) -> str:
    if not dials.grad_checkpoint:
        return ""
    plain = replace(dials, grad_checkpoint=0)
    slower = work_of_token(shape, dials, dials.max_length).operations / work_of_token(shape, plain, dials.max_length).operations
    again = f"{recomputed_layers(shape, dials)} layers are computed twice instead of remembered"
    return (
        f"{again} (grad_checkpoint {dials.grad_checkpoint}): {gb(needed(memory(shape, dials)))} instead of"
        f" {gb(needed(memory(shape, plain)))}, {100 * (slower - 1):.0f} % more time"
    )


def _layers(shape: ModelShape, machine: Machine, dials: Dials, wanted: Wanted) -> str:
    if dials.num_layers is None:
        return f"all {shape.sizes.layers} layers learn"
    everything = memory(shape, replace(dials, num_layers=None))
    return f"the last {dials.num_layers} of {shape.sizes.layers} layers learn: all would need {gb(needed(everything))}"


def _of_data(shape: ModelShape, dials: Dials, data: Data) -> Iterator[str]:
    if dials.max_length < data.longest:
        yield (f"{data.named} has windows of up to {data.longest:,} tokens: prepare it again with --max-length {dials.max_length}")
    yield "examples are counted whole: what several of a step begin with, such as a system prompt, is computed once and saves time"
    if dials.num_layers:
        room = gb(trunk_cache_bytes(shape, dials, data.tokens))
        yield (
            "for more than one pass: cache_trunk=true keeps on the disk what the layers give that do not learn"
            f" ({room} for {data.named}), and the passes after the first leave them out"
        )
