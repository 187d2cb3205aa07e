"""A run folder from start to end: what it learns from is checked, the engine opened, the loop run, or run on."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.config import RunConfig, load_config, make_config, save_config
from mlx_finetune.data.batches import WIDTHS, widths
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.prepare import SETTINGS
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.data.trees import plan as fold
from mlx_finetune.data.trees import tokens_of
from mlx_finetune.engines import TRUNK, Engine, choose_engine, open_engine
from mlx_finetune.engines.experts import stored_at
from mlx_finetune.engines.ranks import agree
from mlx_finetune.engines.supported import check_settings as check_settings_of
from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_file, new_folder, read_json, refuse_existing
from mlx_finetune.models.hub import check_model_folder, model_folder
from mlx_finetune.models.mlx_config import check_supported, hidden_size, max_exact_length, names_of, text_config
from mlx_finetune.models.mlx_proven import PROVEN
from mlx_finetune.models.quantised_sources import packed_by
from mlx_finetune.models.tensor_names import names_in_files, tensor_of, transformers_name
from mlx_finetune.models.weights import fingerprint, tensor_headers
from mlx_finetune.training.checkpoint import TEMPLATE, Origin, check_origin, read_progress, resume
from mlx_finetune.training.evaluations import evaluations
from mlx_finetune.training.longest import check_length
from mlx_finetune.training.loop import Trained, total_steps, train
from mlx_finetune.training.memory_watch import loading
from mlx_finetune.training.progress import Advance
from mlx_finetune.training.samples import Prompt, choose_prompts
from mlx_finetune.training.start import begin, started
from mlx_finetune.training.tracking import check_trackers

COMPUTES = ("engine", "dtype", "quantization", "optimizer")  # what computes, and in what the frozen weights are read
STEPS_LOOKED_AT, WORTH_SAYING = 10, 0.15  # for advice on folding; a share of the tokens
# What may differ when a run goes on: where things stand, what computes, and when to look.
MAY_CHANGE = frozenset({"model", "data", "out", "engine", "device", "dtype", "quantization", "eval_every", "save_every"}) | {
    "grad_checkpoint", "attention", "share_prefixes", "pack_length", "cache_trunk", "torch_compile", "use_liger_kernel", "fsdp",
    "patience", "sample_prompts", "sample_tokens", "report_to",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """All that is known before a model is loaded."""

    config: RunConfig
    model: Path
    dataset: Dataset
    origin: Origin
    run: Path
    resumed: bool
    checkpoint: Path | None  # where a resumed run goes on; None from its start
    steps: int
    template: ChatTemplate
    prompts: Sequence[Prompt]  # held-out ones that are answered on the way


def plan_run(config: RunConfig) -> Plan:
    """A new run.

    Raises:
        UserError: a setting is missing, the run folder exists, or the data was prepared for another tokenizer.
    """
    for name in ("model", "data", "out"):
        if not getattr(config, name):
            raise UserError(f"no {name} given", hint=f"--{name}, or a line `{name}: ...` in the config")
    run = Path(config.out)
    refuse_existing(run, hint="choose another --out, or --resume to go on with it")
    if config.adapter_path:
        config = started(config, layers_of(model_folder(config.model)))
    return _plan(config, run, resumed=False)


def plan_resume(run: Path, overrides: dict[str, Any]) -> Plan:
    """The run of folder `run`, from its last whole checkpoint on.

    Raises:
        UserError: there is no such run, a setting of the training differs, or data or model are others.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run (no config.yaml)", hint="leave out --resume to start one")
    before = load_config(run / "config.yaml", {})
    # What an earlier version did not know yet is not asked for: it is as the data was prepared.
    written = {name: value for name, value in before.to_dict().items() if name in before.model_fields_set}
    config = make_config(written | overrides | {"out": str(run)}, "the command line")
    for name, then in before.to_dict().items():
        now = config.to_dict()[name]
        if now != then and not _may_change(name, then, now):
            raise UserError(f"--resume: {name} was {then!r} in this run, not {now!r}", hint="start a new run with another --out")
    return _plan(config, run, resumed=True)


def last_checkpoint(run: Path) -> Path | None:
    """The whole checkpoint with the most steps; folders appear whole, so every one counts."""
    folders = [folder for folder in (run / "checkpoints").glob("step-*") if folder.name.removeprefix("step-").isdecimal()]
    return max(folders, key=lambda folder: int(folder.name.removeprefix("step-")), default=None)


def _plan(config: RunConfig, run: Path, resumed: bool) -> Plan:
    checkpoint = last_checkpoint(run) if resumed else None
    dataset = Dataset.open(Path(config.data))
    model = model_folder(config.model)
    check_model_folder(model)
    check_length(model, dataset)
    check_engine(config, engine := choose_engine(config.engine))
    check_trackers(config)
    if engine == "mlx":
        check_mlx(model, dataset)
    template = ChatTemplate.load(model, dataset.info["chat_template"])
    if template.fingerprint != dataset.info["tokenizer"]:
        raise UserError(
            f"{config.data}: prepared for another tokenizer than that of {config.model}",
            hint=f"mlx-finetune prepare --model {config.model}",
        )
    origin = Origin(data=dataset.id, model=fingerprint(model))
    if checkpoint:
        check_origin(checkpoint, read_progress(checkpoint), origin)
        check_settings(checkpoint, config)
    config = _as_prepared(config, dataset)
    places = {
        "model": config.model if not Path(config.model).is_dir() else str(model.resolve()),
        "data": str(Path(config.data).resolve()),
    }
    config = config.model_copy(update=places | {"out": str(run.resolve()), "engine": engine})
    prompts = [] if config.fsdp else choose_prompts(dataset, template, config.sample_prompts)
    return Plan(config, model, dataset, origin, run, resumed, checkpoint, total_steps(dataset, config), template, prompts)


def check_settings(checkpoint: Path, config: RunConfig) -> None:
    """Raises UserError where config.yaml was edited after the checkpoint was written."""
    then, now = read_progress(checkpoint).get("config") or {}, config.to_dict()
    for name in now:
        if name in then and then[name] != now[name] and not _may_change(name, then[name], now[name]):
            hint = f"put {name}: {then[name]} back into config.yaml, or start a new run"
            raise UserError(f"{checkpoint}: trained with {name} {then[name]!r}, config.yaml says {now[name]!r}", hint=hint)


def _may_change(name: str, then: Any, now: Any) -> bool:
    return name in MAY_CHANGE or (name == "optimizer" and {then, now} <= {"adamw", "adamw_8bit"})  # the same moments


def _as_prepared(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The config with what `prepare` was told; raises UserError where the person now asks for something else."""
    for name in SETTINGS:
        asked, prepared = getattr(config, name), dataset.info[name]
        if name in config.model_fields_set and asked != prepared:
            hint = f"run mlx-finetune prepare again, or leave {name} out"
            raise UserError(f"{name} = {asked}, but {dataset.folder} was prepared with {prepared}", hint=hint)
    return config.model_copy(update={name: dataset.info[name] for name in SETTINGS})


def check_engine(config: RunConfig, engine: str) -> None:
    """Raises UserError for a setting that `engine` does not have, or a device that is not there: nothing is loaded yet."""
    check_settings_of(config, engine)
    if engine == "torch":
        from mlx_finetune.engines.torch.device import check_device

        check_device(config)


def why_on_the_cpu(config: RunConfig) -> str | None:
    """In a sentence, where a run of the torch engine was told no device."""
    if config.engine != "torch" or config.device != "auto":
        return None
    from mlx_finetune.engines.torch.device import without_cuda

    reason = without_cuda()
    return f"computes on the CPU: {reason}" if reason else None


def layers_of(model: Path) -> int:
    """How many layers a model folder says that it has."""
    check_model_folder(model)
    found = read_json(model / "config.json")
    found |= found.get("text_config") or {}
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if found.get(name) is not None:
            return int(found[name])
    raise UserError(f"{model}/config.json: it does not say how many layers there are", hint="leave adapter_path out")


def check_mlx(model: Path, dataset: Dataset) -> None:
    """Raises UserError where MLX would compute something else than transformers: another architecture, or beyond a window."""
    architecture = read_json(model / "config.json")
    check_supported(architecture)
    if method := packed_by(architecture):
        raise UserError(
            f"{model}: its weights are packed by {method}", hint=f"mlx-finetune convert {model} --out DIR keeps its 4 bits"
        )
    longest, exact = max(dataset.train.lengths + dataset.valid.lengths), max_exact_length(architecture)
    if exact is not None and longest > exact:
        raise UserError(
            f"{dataset.folder}: an example of {longest} tokens; with MLX {model} is exact up to {exact} (its sliding window)",
            hint=f"prepare with --max-length {exact}, or train with --engine torch",
        )


def check_names(engine: Engine, model: Path) -> None:
    """Raises UserError where an adapted module is not a tensor of the checkpoint: its adapter could not be handed back."""
    headers, config = tensor_headers(model), read_json(model / "config.json")
    quantised = any(tensor.dtype == "U32" for tensor in headers.values())
    if quantised and config.get("quantization"):  # in the layout of mlx-lm's class
        names = names_of(config)
        headers = {transformers_name(name, names): tensor for name, tensor in headers.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in headers.items()}
    for name, target in engine.targets.items():
        if target.kind == "experts":
            at = (stored_at(shapes, one, target.count - 1, target.rows, target.columns) for one in names_in_files(name))
            if quantised or any(at):
                continue
        tensor = headers.get(tensor_of(name, headers))
        if tensor is None or (tensor.dtype in ("F32", "F16", "BF16") and tuple(tensor.shape) != (target.rows, target.columns)):
            raise UserError(
                f"{name}: not a tensor of that name and shape in {model}, so a tuned model could not be handed back",
                hint="this architecture comes later; name other target_modules",
            )


def execute(plan: Plan, advance: Advance) -> tuple[Trained, Engine]:
    """Loads the model and trains; the run folder is made once the engine is open."""
    with loading(plan.model):
        engine = open_engine(packed(plan.config, plan.dataset), plan.model)
        check_names(engine, plan.model)
        start = resume(plan.checkpoint, engine, plan.config, plan.origin) if plan.checkpoint else 0
    if not start and plan.config.adapter_path:
        begin(engine, plan.config, layers_of(plan.model))
    _agree(engine, plan, start)
    if not engine.ranks.rank:
        _make_folder(plan)
    with evaluations(engine, plan.dataset, plan.config, plan.run, start, plan.prompts, plan.template) as look:
        trained = train(engine, plan.dataset, plan.config, plan.run, plan.origin, start, look, advance)
    if not trained.interrupted and (plan.run / TRUNK).is_dir():
        shutil.rmtree(plan.run / TRUNK)
    return trained, engine


def _agree(engine: Engine, plan: Plan, start: int) -> None:
    settings = json.dumps(plan.config.to_dict() | {"device": ""}, sort_keys=True)
    agree(engine.ranks, settings=settings, step=str(start), data=str(plan.origin.data), model=str(plan.origin.model))


def _make_folder(plan: Plan) -> None:
    if not plan.resumed:
        new_folder(plan.run)
    save_config(plan.run / "config.yaml", plan.config)
    with atomic_file(plan.run / TEMPLATE) as file:
        file.write(plan.dataset.info["chat_template"])


def moved(plan: Plan) -> str | None:
    """What it means that a run goes on elsewhere than it went so far, in a sentence; None where it does not."""
    if not plan.checkpoint:
        return None
    then, config = read_progress(plan.checkpoint), plan.config
    before = then.get("config", {}) | {"engine": then.get("engine")}
    changed = {name: before[name] for name in COMPUTES if before.get(name) not in (None, getattr(config, name))}
    other = None if "engine" in changed else _other_device(config, then.get("device"))
    if not changed and not other:
        return None
    what = ", ".join(
        [*(f"{name} {value} -> {getattr(config, name)}" for name, value in changed.items()), *([other] if other else [])]
    )
    dropout = ", and dropout drops others" if config.dropout and "engine" in changed else ""
    trained = "weights" if config.fine_tune_type == "full" else "adapter"
    return f"goes on with {what}: {trained}, optimizer and place in the data are the same; rounding differs{dropout}"


def _other_device(config: RunConfig, before: str | None) -> str | None:
    """That the torch engine computes elsewhere now, in words."""
    if config.engine != "torch" or before is None:
        return None
    from mlx_finetune.engines.torch.device import check_device, half_of

    now = check_device(config)
    weights = f" (weights in {half_of(now)})" if config.dtype == "auto" else ""
    return f"device {before} -> {now}{weights}" if now != before else None


def packed(config: RunConfig, dataset: Dataset) -> RunConfig:
    """With `pack_length` said: as many tokens as the largest micro-batch has, where the config leaves it open.

    A pure function of data and settings: what is folded together decides which inputs a dropout drops.
    """
    if config.pack_length or config.share_prefixes == "never":
        return config
    longest = int(widths(np.array(dataset.train.lengths)).max())
    return config.model_copy(update={"pack_length": longest * config.batch_size})


def folding_advice(plan: Plan) -> str | None:
    """What `pack_length` would save where the examples of a step begin alike, in a sentence; None where that is little."""
    config, dataset = packed(plan.config, plan.dataset), plan.dataset
    architecture = PROVEN.get(str(text_config(read_json(plan.model / "config.json")).get("model_type")))
    if not config.pack_length or plan.config.pack_length or (architecture and architecture.own_attention):
        return None
    now, folded, most = 0, 0, 0
    for step in range(min(STEPS_LOOKED_AT, dataset.steps_per_epoch(config))):
        batches = dataset.batches_at(step, config)
        whole = sum(len(tree.inputs) for tree in fold(batches, sum(batch.inputs.size for batch in batches)))
        now += min(tokens_of(batches), sum(len(tree.inputs) for tree in fold(batches, config.pack_length)))
        folded, most = folded + whole, max(most, whole)
    if folded > (1 - WORTH_SAYING) * now:
        return None
    length = math.ceil(most / WIDTHS) * WIDTHS
    return f"with pack_length={length} {1 - folded / now:.0%} fewer tokens are computed, and more memory is used at once"


def trunk_bytes(plan: Plan) -> int:
    """What `cache_trunk` takes on the disk; 0 without it.

    Raises:
        UserError: there is no room for it.
    """
    if not plan.config.cache_trunk:
        return 0
    width = hidden_size(read_json(plan.model / "config.json"))
    size = 4 if plan.config.dtype in ("auto", "float32") else 2  # auto may be less
    needed = size * width * sum(length - 1 for length in plan.dataset.train.lengths + plan.dataset.valid.lengths)
    free = shutil.disk_usage(plan.run.absolute().parent).free
    if needed > free:
        message = f"cache_trunk needs {needed / 1e9:.1f} GB in {plan.run}, where {free / 1e9:.1f} GB are free"
        raise UserError(message, hint="make room, or leave cache_trunk out")
    return needed
