"""What each verb does, from its checked arguments to the lines that a person reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mlx_finetune.config import RunConfig, default, make_config, parse_assignments
from mlx_finetune.data.batches import efficiency
from mlx_finetune.data.dataset import prepared_before
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError
from mlx_finetune.models.hub import check_model_folder, model_folder
from mlx_finetune.models.weights import fingerprint
from mlx_finetune.prepared import show_dataset
from mlx_finetune.road import load_settings
from mlx_finetune.terminal import Done, finish, progress, say

if TYPE_CHECKING:
    from mlx_finetune.training.loop import Trained
    from mlx_finetune.training.run import Plan


def load_template(model: str) -> ChatTemplate:
    """The chat template of a model named by the user, checked."""
    folder = model_folder(model)
    check_model_folder(folder)
    return ChatTemplate.load(folder)


def prepare_command(
    collected: Sequence[Path], model: str, out: Path, settings: dict[str, Any], as_json: bool, update: bool = False
) -> None:
    """`mlx-finetune prepare`."""
    prepared(collected, model, out, settings, update).finish(as_json)


def prepared(collected: Sequence[Path], model: str, out: Path, settings: dict[str, Any], update: bool) -> Done:
    """Makes the folder `out`."""
    _refuse_share_of_all(settings["openassistant_share"])
    config = make_config(settings, "prepare")
    prepared_before(out)
    folder = model_folder(model)
    check_model_folder(folder)
    template = ChatTemplate.load(folder)
    say(f"rendering {', '.join(map(str, collected))} with the chat template of {folder}")
    say(f"into windows of {config.max_length} tokens -> {out}")
    for line in template.remarks:
        say(line)
    origin = {"model": model, "model_fingerprint": fingerprint(folder)}
    with progress("prepare") as advance:
        info = prepare(collected, template, config, out, origin, advance, update)
    if info.get("unchanged"):
        say("nothing has changed since it was prepared")
    following = f"mlx-finetune train --model {model} --data {out} --out run"
    return Done(info | {"out": str(out)}, lambda: show_dataset(info), out, following)


def _refuse_share_of_all(share: float) -> None:
    if share >= 1:
        hint = "0.99 makes it 99 %; for OpenAssistant alone prepare its own file, COLLECTED/openassistant.jsonl"
        raise UserError(f"--openassistant-share {share:g}: a share beside other conversations is less than 1", hint=hint)


def train_command(
    file: Path | None, named: dict[str, Any], assignments: Sequence[str], resume: bool, dry_run: bool, as_json: bool
) -> None:
    """`mlx-finetune train`."""
    from mlx_finetune.training.memory_watch import again

    plan = _plan_of(file, parse_assignments(list(assignments)) | named, resume)
    config = plan.config
    announce(plan)
    if dry_run:
        result = {"steps": plan.steps, "config": config.to_dict()}
        finish(result, as_json, lambda: show_config(config), None, "the same without --dry-run")
        return
    trained_run(plan, again(str(plan.run))).finish(as_json)


def trained_run(plan: "Plan", command: str) -> Done:
    """Trains, and draws the loss; `command`: what goes on with it where it ends before its last step, which raises Exit."""
    from mlx_finetune.training.progress import training_progress
    from mlx_finetune.training.run import execute

    config = plan.config
    try:
        with training_progress() as advance:
            trained, engine = execute(plan, advance)
        if engine.ranks.rank == 0:
            _draw(plan.run)
    except KeyboardInterrupt as error:
        _say_how_to_go_on(plan.run, command)
        raise typer.Exit(130) from error
    _say_why_it_ended(trained, config, command)
    rate = trained.tokens_learned / trained.seconds if trained.seconds else 0.0
    name, memory = engine.name, engine.peak_memory()
    where = engine.device if engine.ranks.size == 1 else f"{engine.device}, {engine.ranks.size} processes"
    measured = {"learned_tokens_per_second": rate, "peak_memory": memory}

    def show() -> None:  # holds no engine: what comes next may need the memory
        print(f"{trained.step} steps on {name} ({where}), {rate:.0f} learned tokens a second")
        if trained.not_applied:
            print(f"{trained.not_applied} of them were not applied: loss or gradient was not finite")
        print(f"{trained.tokens_seen:,} tokens read, {trained.tokens_computed:,} computed")
        print(f"peak memory {memory / 1e9:.2f} GB")

    return Done(vars(trained) | measured | {"out": str(plan.run)}, show, plan.run, f"mlx-finetune evaluate {plan.run}")


def _draw(run: Path) -> None:
    """The run is done, with a picture or without."""
    from mlx_finetune.evaluation.plot import draw_loss

    try:
        if draw_loss(run) is None:
            say("loss.png was not drawn: pip install matplotlib")
    except UserError as error:
        say(f"loss.png was not drawn: {error.message}")


def _say_how_to_go_on(run: Path, command: str) -> None:
    """Where a run was broken off at once: what is saved of it."""
    from mlx_finetune.training.checkpoints import last_checkpoint

    if not (run / "config.yaml").is_file():
        say("interrupted before the run began: the same command begins it")
        return
    last = last_checkpoint(run)
    say(f"interrupted at once: {last.name if last else 'no checkpoint'} is saved")
    say(f"next: {command}")


def _plan_of(file: Path | None, overrides: dict[str, Any], resume: bool) -> "Plan":
    """A new run, or with `resume` the one in `out` from its last checkpoint on."""
    from mlx_finetune.training.run import plan_resume, plan_run

    if not resume:
        config, of_run = load_settings(file, overrides)
        if of_run:
            names = f"{', '.join(of_run)} {'is' if len(of_run) == 1 else 'are'}"
            say(f"{file}: {names} for mlx-finetune run; train takes the other settings")
        return plan_run(config)
    if file:
        raise UserError(f"{file}: a resumed run has its own settings", hint="leave the file out, or --resume")
    run = make_config(overrides, "the command line").out
    if not run:
        hint = "mlx-finetune train --resume --out RUN"
        raise UserError("--resume goes on with the run in --out, with its own settings", hint=hint)
    return plan_resume(Path(run), {name: value for name, value in overrides.items() if name != "out"})


def _say_why_it_ended(trained: "Trained", config: RunConfig, command: str) -> None:
    """Before its last step; raises Exit where it was interrupted."""
    from mlx_finetune.training.memory_watch import less_memory

    if trained.shortage:
        say(f"stopped for want of memory: {trained.shortage}; step {trained.step} of {trained.steps} is saved")
        say(f"next: {less_memory(config, command)}")
        raise typer.Exit(130)
    if trained.interrupted:
        say(f"interrupted: step {trained.step} of {trained.steps} is saved")
        say(f"next: {command}")
        raise typer.Exit(130)
    if trained.stopped_early:
        say(f"stopped early, at step {trained.step} of {trained.steps}: {trained.stopped_early}")
        say(f"to go on all the same: {command} --set patience={2 * config.patience}")


def announce(plan: "Plan") -> None:
    """What a run will do, where, and what it takes of memory and disk.

    Raises:
        UserError: more than there is.
    """
    from mlx_finetune.planning.before_run import check_memory
    from mlx_finetune.training.checks import why_on_the_cpu
    from mlx_finetune.training.remarks import (
        experts_left_alone,
        folding_advice,
        folds_nothing,
        gone_back,
        looks_at_nothing,
        moved,
        untrained_tokens,
    )
    from mlx_finetune.training.run import trunk_bytes
    from mlx_finetune.training.tracking import where_it_goes

    config, dataset = plan.config, plan.dataset
    start = f", going on from {plan.checkpoint.name}" if plan.checkpoint else ""
    say(f"training {config.model} on {len(dataset.train)} examples of {config.data}")
    say(f"{plan.steps} steps{start} -> {plan.run}")
    for line in gone_back(plan):
        say(line)
    remarks = why_on_the_cpu(config), moved(plan), folds_nothing(config), experts_left_alone(plan.model, config)
    looks = looks_at_nothing(config, len(dataset.valid))
    for remark in (*remarks, untrained_tokens(plan.model, config, dataset.train), looks, *where_it_goes(config, plan.run)):
        if remark:
            say(remark)
    say(f"{100 * efficiency(dataset.train.lengths, config.batch_size, config.seed):.1f} % of the tokens read are no padding")
    if config.engine == "mlx":
        counts = dataset.info["train"]
        say(check_memory(plan.model, config, dataset.train, counts["learned_tokens"] / counts["tokens"]))
        if advice := folding_advice(plan):
            say(advice)
    if kept := trunk_bytes(plan):
        say(f"what the frozen layers make of the data is kept in {plan.run}: up to {kept / 1e9:.1f} GB until the run is done")


def show_config(config: RunConfig) -> None:
    """The resolved settings; those that differ from the default are marked."""
    for name, value in config.to_dict().items():
        print(f"{name}: {value}" + ("" if value == default(name) else "   (set)"))
