"""What `mlx-finetune plan` does: from a model's name to advice for one machine and for all usual sizes of memory."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_finetune.config import RunConfig, default, make_config
from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_file, refuse_existing
from mlx_finetune.planning.advice import EXAMPLES, Choice, Wanted, choose, gb, needed
from mlx_finetune.planning.calibrate import Calibration, calibrate
from mlx_finetune.planning.machine import GIB, Machine, find_chip, parse_memory, planned_machine, this_machine
from mlx_finetune.planning.memory import LEARNED_SHARE
from mlx_finetune.planning.model_shape import ModelShape, model_shape
from mlx_finetune.planning.speed import Data, Speed, calibrated_speed, data_of, expected_speed
from mlx_finetune.planning.wording import duration, reasons
from mlx_finetune.terminal import finish, progress, say, table

SIZES = (8, 16, 24, 32, 64)  # GB
MILLION = 1_000_000
PHASES = {
    "load": "most while the model is loaded",
    "step": "  in a step",
    "update": "  when the adapter is updated",
    "evaluation": "  in an evaluation",
}


@dataclass(frozen=True)
class PlanOptions:
    """The options of the verb, as given."""

    model: str
    data: str
    memory: str
    chip: str
    calibrate: bool
    write: Path | None
    as_json: bool


@dataclass(frozen=True)
class Plan:
    """One machine's plan."""

    machine: Machine
    choice: Choice
    reasons: tuple[str, ...]
    speed: Speed | None


def plan_command(options: PlanOptions) -> None:
    """`mlx-finetune plan`."""
    if options.write:
        refuse_existing(options.write, hint="choose another --write, or move the old one away")
    machine = _machine(options)
    data = data_of(options.data) if options.data else None
    shape = model_shape(options.model)
    wanted = Wanted(data.longest if data else default("max_length"), data.learned_share if data else LEARNED_SHARE)
    plan = make_plan(shape, machine, wanted, data)
    measured = _calibrate(options, shape, plan) if options.calibrate else None
    others = [make_plan(shape, _with_memory(machine, size), wanted, data) for size in SIZES]
    if measured:
        plan, *others = (_measured(shape, each, measured, data) for each in (plan, *others))
    if options.write:
        _write(options, shape, plan)
    result = to_json(shape, plan, others, data, measured) | {"config": str(options.write) if options.write else None}
    following = _following(options, shape, plan)
    finish(result, options.as_json, lambda: _show(shape, plan, others, data, following), options.write, following[0])


def make_plan(shape: ModelShape, machine: Machine, wanted: Wanted, data: Data | None) -> Plan:
    """The best that fits into the machine, why, and how fast."""
    choice = choose(shape, machine, wanted)
    speed = expected_speed(shape, choice.dials, _length(choice, data), machine) if choice.fits else None
    return Plan(machine, choice, reasons(shape, machine, choice, wanted, data), speed)


def settings_of(plan: Plan, shape: ModelShape) -> dict[str, Any]:
    """The plan's part of a config for `train`, in RunConfig's words; bits are the model's."""
    d = plan.choice.dials
    named = {name: getattr(d, name) for name in ("max_length", "batch_size", "num_layers", "rank", "attention", "grad_checkpoint")}
    return named | {"gradient_accumulation": max(1, EXAMPLES // d.batch_size), "dtype": _dtype(plan, shape)}


def to_json(
    shape: ModelShape, plan: Plan, others: Sequence[Plan], data: Data | None, measured: Calibration | None
) -> dict[str, Any]:
    """Everything that was found out; bytes, and hours for the data set or for a million tokens."""
    sizes = shape.sizes
    model = {name: getattr(sizes, name) for name in ("architecture", "layers", "hidden", "heads", "kv_heads", "head_dim")}
    model |= {"intermediate": sizes.intermediate, "vocabulary": sizes.vocabulary, "tied": sizes.tied}
    model |= {"name": shape.name, "parameters": shape.parameters, "weight_bytes": shape.weight_bytes()}
    model |= {"bits": shape.stored_bits, "bytes_by_dtype": dict(shape.bytes_by_dtype), "remarks": list(shape.remarks)}
    return {
        "model": model,
        "data": asdict(data) if data else None,
        "calibration": asdict(measured) if measured else None,
        "plan": _plan_json(plan, shape, data),
        "sizes": [_plan_json(each, shape, data) for each in others],
    }


def _plan_json(plan: Plan, shape: ModelShape, data: Data | None) -> dict[str, Any]:
    hours = plan.speed.hours(data.tokens if data else MILLION) if plan.speed else None
    return {
        "machine": asdict(plan.machine),
        "fits": plan.choice.fits,
        "bits": plan.choice.dials.bits,
        "settings": settings_of(plan, shape),
        "memory": asdict(plan.choice.memory),
        "needed": needed(plan.choice.memory),
        "reasons": list(plan.reasons),
        "tokens_per_second": asdict(plan.speed) if plan.speed else None,
        "hours": dict(zip(("least", "likely", "most"), hours, strict=True)) if hours else None,
    }


def _machine(options: PlanOptions) -> Machine:
    here = this_machine() if options.calibrate or not (options.memory and options.chip) else None
    if not options.memory and not options.chip:
        assert here
        return here
    if options.calibrate:
        raise UserError("--calibrate measures this machine", hint="leave --memory and --chip out")
    chip = find_chip(options.chip) if options.chip else here.chip if here else None
    if options.memory:
        return planned_machine(chip, parse_memory(options.memory))
    assert here and chip
    if here.chip == chip:
        return here
    sold = ", ".join(map(str, chip.memories))
    raise UserError(f"--chip {options.chip}: with how much memory?", hint=f"add --memory; {chip.name} is sold with {sold} GB")


def _with_memory(machine: Machine, size: int) -> Machine:
    """A Mac of that size with the machine's chip; on a machine that is none, with a chip of which nothing is known."""
    return planned_machine(machine.chip, size * GIB)


def _calibrate(options: PlanOptions, shape: ModelShape, plan: Plan) -> Calibration:
    folder = Path(options.model).expanduser()
    if not folder.is_dir() or not shape.bytes_by_dtype:
        hint = "download the model, and name its folder; or leave --calibrate out"
        raise UserError(f"{options.model}: --calibrate runs the model, and its weights are not here", hint=hint)
    if not plan.choice.fits or _is_packed(plan, shape):
        hint = "name the converted model, or leave --calibrate out"
        raise UserError(f"{options.model}: as it is stored it does not fit, so --calibrate cannot run it", hint=hint)
    say(f"training on random tokens for twenty seconds, with the settings of the plan, on {plan.machine.name}")
    with progress("calibrate") as advance:
        return calibrate(folder, shape, plan.choice.dials, progress=advance)


def _measured(shape: ModelShape, plan: Plan, measured: Calibration, data: Data | None) -> Plan:
    if not plan.choice.fits or (plan.machine.chip is None and plan.machine.on_gpu):  # a Mac is another machine than this
        return plan
    length = _length(plan.choice, data)
    return replace(plan, speed=calibrated_speed(shape, plan.choice.dials, length, measured.operations_per_second))


def _length(choice: Choice, data: Data | None) -> float:
    return min(data.usual_length, choice.dials.max_length) if data else choice.dials.max_length


def _dtype(plan: Plan, shape: ModelShape) -> str:
    """`auto` keeps weights as they are stored."""
    return plan.choice.dials.dtype if plan.choice.dials.bits == 16 and shape.dtype == "F32" else "auto"


def _is_packed(plan: Plan, shape: ModelShape) -> bool:
    """Whether the plan asks for a quantised model where the one that there is is not."""
    return plan.choice.dials.bits < min(16, shape.stored_bits)


def _model_name(options: PlanOptions) -> str:
    """A config.json stands for the folder that it lies in."""
    path = Path(options.model).expanduser()
    return str(path.parent) if path.is_file() else options.model


def _quantised_folder(options: PlanOptions, plan: Plan) -> str:
    return f"{Path(_model_name(options)).resolve().name}-{plan.choice.dials.bits}bit"


def _following(options: PlanOptions, shape: ModelShape, plan: Plan) -> list[str]:
    """The commands that follow, in order."""
    if not plan.choice.fits:
        return ["mlx-finetune plan with a smaller model"]
    model, commands = _model_name(options), []
    if _is_packed(plan, shape):
        packed = _quantised_folder(options, plan)
        dtype = " --dtype bfloat16" if shape.dtype == "F32" else ""
        commands.append(f"mlx-finetune convert {model} --bits {plan.choice.dials.bits}{dtype} --out {packed}")
        model = packed
    if not options.data:
        commands.append(f"mlx-finetune prepare COLLECTED --model {model} --max-length {plan.choice.dials.max_length} --out dataset")
    settings = f"{options.write} " if options.write else " ".join(f"--set {k}={v}" for k, v in _changed(plan, shape).items()) + " "
    places = "" if options.write and options.data else f"--data {options.data or 'dataset'} "
    commands.append(f"mlx-finetune train {settings}{'' if options.write else f'--model {model} '}{places}--out run")
    return commands


def _changed(plan: Plan, shape: ModelShape) -> dict[str, Any]:
    """Settings that are not RunConfig's own."""
    return {name: value for name, value in settings_of(plan, shape).items() if value != default(name)}


def _write(options: PlanOptions, shape: ModelShape, plan: Plan) -> None:
    """A config for `train`, each setting of the plan's with its reason above all of them."""
    import yaml

    if not plan.choice.fits:
        raise UserError(f"{options.model}: {plan.reasons[0]}", hint=plan.reasons[-1])
    model = _quantised_folder(options, plan) if _is_packed(plan, shape) else _model_name(options)
    values = {"model": model, "data": options.data, "out": "run"} | settings_of(plan, shape)
    config: RunConfig = make_config({name: value for name, value in values.items() if value not in ("", None)}, "the plan")
    assert options.write
    with atomic_file(options.write) as file:
        file.writelines(f"# {line}\n" for line in (f"planned for {plan.machine.name}", *plan.reasons))
        kept = {name: value for name, value in config.to_dict().items() if name in values and value not in ("", None)}
        yaml.safe_dump(kept, file, sort_keys=False, allow_unicode=True)


def _show(shape: ModelShape, plan: Plan, others: Sequence[Plan], data: Data | None, following: Sequence[str]) -> None:
    billion = shape.parameters >= 1e9
    count = (
        f"{shape.parameters / (1e9 if billion else 1e6):.{2 if billion else 0}f} {'billion' if billion else 'million'} parameters"
    )
    kind = f"{shape.sizes.architecture}, {count}, {shape.sizes.layers} layers"
    print(f"{shape.name}: {kind}, {gb(shape.weight_bytes())} in {shape.stored_bits} bits")
    for remark in shape.remarks:
        print(f"  {remark}")
    unit = f"one pass over {data.named}" if data else "a million tokens"
    header = ("memory of a Mac", "weights", "window", "layers that learn", "needs", "may use", unit)
    table("what fits", [_row(each, shape, data) for each in others], header)
    print(f"the plan for {plan.machine.name}: {gb(plan.machine.usable)} may be used ({plan.machine.rule})")
    for reason in plan.reasons:
        print(f"  - {reason}")
    if plan.choice.fits:
        table("memory", list(_memory_rows(plan)))
        print(f"time for {unit}: {duration(plan.speed, data.tokens if data else MILLION)}{_basis(plan)}")
        print("what to run:")
        for number, command in enumerate(following):
            print(f"  {number + 1}. {command}")


def _row(plan: Plan, shape: ModelShape, data: Data | None) -> tuple[str, ...]:
    d, size = plan.choice.dials, f"{plan.machine.memory / GIB:.0f} GB"
    if not plan.choice.fits:
        return size, "does not fit", "", "", gb(needed(plan.choice.memory)), gb(plan.machine.usable), ""
    layers = f"{d.num_layers} of {shape.sizes.layers}" if d.num_layers else "all"
    time = duration(plan.speed, data.tokens if data else MILLION)
    return size, f"{d.bits} bits", f"{d.max_length:,}", layers, gb(needed(plan.choice.memory)), gb(plan.machine.usable), time


def _memory_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    found = plan.choice.memory
    yield "weights, never changed", gb(found.weights)
    yield "adapter: what is learned", gb(found.adapter)
    yield "its optimizer and gradient", gb(found.optimizer + found.gradient)
    yield "kept of each token for the backward pass", gb(found.activations)
    yield "for a moment, in the fullest place", gb(found.transient)
    yield "most at once", gb(found.peak)
    yield "  with a reserve for what a prediction misses", gb(needed(found))
    for phase, size in found.phases.items():
        yield PHASES[phase], gb(size)


def _basis(plan: Plan) -> str:
    if plan.speed is None:
        return ": name the --chip, or measure it with --calibrate" if plan.machine.on_gpu else ": --calibrate measures it"
    if plan.speed.measured:
        return ", from what twenty seconds of steps reached"
    assert plan.machine.chip
    source = {"vendor": "as Apple says", "others": "as others measured", "at least": "at least"}[plan.machine.chip.source]
    return f", from {plan.machine.chip.tflops} TFLOPS {source} and {plan.machine.chip.bandwidth:g} GB/s; --calibrate measures it"
