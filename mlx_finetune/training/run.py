"""A run folder from start to end: what it learns from is checked, the engine opened, the loop run, or run on."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.config import RunConfig, load_config, make_config, save_config
from mlx_finetune.data.batches import widths
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.prepare import SETTINGS
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.engines import TRUNK, Engine, choose_engine, open_engine
from mlx_finetune.engines.ranks import agree
from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_file, read_json
from mlx_finetune.launched import rank_of
from mlx_finetune.models.hub import check_model_folder, model_folder
from mlx_finetune.models.mlx_config import hidden_size
from mlx_finetune.models.weights import fingerprint
from mlx_finetune.training.checkpoint import TEMPLATE, Origin, check_origin, resume
from mlx_finetune.training.checkpoints import DamagedCheckpoint, clear, last_checkpoint, last_whole, mend_links, set_aside
from mlx_finetune.training.checks import check_engine, check_mlx, check_names, check_settings, layers_of, may_change
from mlx_finetune.training.evaluations import evaluations
from mlx_finetune.training.folder import for_one_run, refuse_run
from mlx_finetune.training.lock import refuse_running
from mlx_finetune.training.longest import check_length
from mlx_finetune.training.loop import Trained, total_steps, train
from mlx_finetune.training.made_from import check_made_from, write_made_from
from mlx_finetune.training.manifest import read_progress
from mlx_finetune.training.memory_watch import loading
from mlx_finetune.training.progress import Advance
from mlx_finetune.training.samples import Prompt, choose_prompts
from mlx_finetune.training.start import adapter_id, begin, started
from mlx_finetune.training.tracking import check_trackers


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
    damaged: Sequence[DamagedCheckpoint] = ()  # after `checkpoint`, last one first


def plan_run(config: RunConfig) -> Plan:
    """A new run.

    Raises:
        UserError: a setting is missing, the run folder exists, or the data was prepared for another tokenizer.
    """
    for name in ("model", "data", "out"):
        if not getattr(config, name):
            raise UserError(f"no {name} given", hint=f"--{name}, or a line `{name}: ...` in the config")
    run = Path(config.out)
    if not rank_of():  # the others may find what the first has made
        refuse_run(run)
    if config.adapter_path:
        config = started(config, layers_of(model_folder(config.model)))
    return _plan(config, run, resumed=False)


def plan_resume(run: Path, overrides: dict[str, Any]) -> Plan:
    """The run of folder `run`, from its last whole checkpoint on.

    Raises:
        UserError: there is no such run, another process trains there, no checkpoint is whole, a setting of the training differs,
            or data or model are others.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run (no config.yaml)", hint="leave out --resume to start one")
    if not rank_of():  # the others may find it locked by the first
        refuse_running(run)
    before = load_config(run / "config.yaml", {})
    # What an earlier version did not know yet is not asked for: it is as the data was prepared.
    written = {name: value for name, value in before.to_dict().items() if name in before.model_fields_set}
    config = make_config(written | overrides | {"out": str(run)}, "the command line")
    for name, then in before.to_dict().items():
        now = config.to_dict()[name]
        if now != then and not may_change(name, then, now):
            raise UserError(f"--resume: {name} was {then!r} in this run, not {now!r}", hint="start a new run with another --out")
    return _plan(config, run, resumed=True)


def _plan(config: RunConfig, run: Path, resumed: bool) -> Plan:
    checkpoint, damaged = last_whole(run) if resumed else (None, [])
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
        progress = read_progress(checkpoint)
        check_origin(checkpoint, progress, origin)
        check_settings(checkpoint, config)
        origin = replace(origin, adapter=str(progress.get("adapter") or ""))
    else:
        origin = replace(origin, adapter=adapter_id(config.adapter_path))
    if resumed and not checkpoint:
        check_made_from(run, origin)
    config = _as_prepared(config, dataset)
    places = {
        "adapter_path": config.adapter_path and str(Path(config.adapter_path).resolve()),
        "model": config.model if not Path(config.model).is_dir() else str(model.resolve()),
        "data": str(Path(config.data).resolve()),
    }
    config = config.model_copy(update=places | {"out": str(run.resolve()), "engine": engine})
    prompts = [] if config.fsdp else choose_prompts(dataset, template, config.sample_prompts)
    steps = total_steps(dataset, config)
    return Plan(config, model, dataset, origin, run, resumed, checkpoint, steps, template, prompts, damaged)


def _as_prepared(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The config with what `prepare` was told; raises UserError where the person now asks for something else."""
    for name in SETTINGS:
        asked, prepared = getattr(config, name), dataset.info[name]
        if name in config.model_fields_set and asked != prepared:
            hint = f"run mlx-finetune prepare again, or leave {name} out"
            raise UserError(f"{name} = {asked}, but {dataset.folder} was prepared with {prepared}", hint=hint)
    return config.model_copy(update={name: dataset.info[name] for name in SETTINGS})


def execute(plan: Plan, advance: Advance) -> tuple[Trained, Engine]:
    """Loads the model and trains, in a folder that is this process's own; where the engine cannot be opened nothing is left.

    Raises:
        UserError: another process trains there, or went on with the run since it was planned.
    """
    if rank_of():  # the first process alone writes
        return _execute(plan, advance)
    with for_one_run(plan.run, plan.resumed):
        before = plan.damaged[0].folder if plan.damaged else plan.checkpoint
        if plan.resumed and last_checkpoint(plan.run) != before:
            raise UserError(f"{plan.run}: another process went on with it meanwhile", hint="give the same command again")
        return _execute(plan, advance)


def _execute(plan: Plan, advance: Advance) -> tuple[Trained, Engine]:
    with loading(plan.model):
        engine = open_engine(packed(plan.config, plan.dataset), plan.model)
        check_names(engine, plan.model)
        start = resume(plan.checkpoint, engine, plan.config, plan.origin) if plan.checkpoint else 0
    if not start and plan.config.adapter_path:
        begin(engine, plan.config, layers_of(plan.model))
    _agree(engine, plan, start)
    if not engine.ranks.rank:
        _begin_folder(plan)
    with evaluations(engine, plan.dataset, plan.config, plan.run, start, plan.prompts, plan.template) as look:
        trained = train(engine, plan.dataset, plan.config, plan.run, plan.origin, start, look, advance)
    if not trained.interrupted and (plan.run / TRUNK).is_dir():
        shutil.rmtree(plan.run / TRUNK)
    return trained, engine


def _agree(engine: Engine, plan: Plan, start: int) -> None:
    settings = json.dumps(plan.config.to_dict() | {"device": ""}, sort_keys=True)
    agree(engine.ranks, settings=settings, step=str(start), data=str(plan.origin.data), model=str(plan.origin.model))


def _begin_folder(plan: Plan) -> None:
    """What there is before the first step; of a run that goes on, what a crash left is put right."""
    if plan.resumed:
        clear(plan.run)
        set_aside(plan.damaged)
        mend_links(plan.run, plan.checkpoint)
    else:
        write_made_from(plan.run, plan.origin)
    save_config(plan.run / "config.yaml", plan.config)
    with atomic_file(plan.run / TEMPLATE) as file:
        file.write(plan.dataset.info["chat_template"])


def packed(config: RunConfig, dataset: Dataset) -> RunConfig:
    """With `pack_length` said: as many tokens as the largest micro-batch has, where the config leaves it open.

    A pure function of data and settings: what is folded together decides which inputs a dropout drops.
    """
    if config.pack_length or config.share_prefixes == "never":
        return config
    longest = int(widths(np.array(dataset.train.lengths)).max())
    return config.model_copy(update={"pack_length": longest * config.batch_size})


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
