"""What each verb does, from its checked arguments to the lines that a person reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mlx_finetune.config import RunConfig, default, load_config, make_config, parse_assignments
from mlx_finetune.data.batches import efficiency
from mlx_finetune.data.dataset import prepared_before
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError
from mlx_finetune.launched import launched
from mlx_finetune.models.hub import check_model_folder, model_folder
from mlx_finetune.models.weights import fingerprint
from mlx_finetune.prepared import show_dataset
from mlx_finetune.terminal import finish, progress, say

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
    finish(info | {"out": str(out)}, as_json, lambda: show_dataset(info), out, following)


def _refuse_share_of_all(share: float) -> None:
    if share >= 1:
        hint = "0.99 makes it 99 %; for OpenAssistant alone prepare its own file, COLLECTED/openassistant.jsonl"
        raise UserError(f"--openassistant-share {share:g}: a share beside other conversations is less than 1", hint=hint)


def train_command(
    file: Path | None, named: dict[str, Any], assignments: Sequence[str], resume: bool, dry_run: bool, as_json: bool
) -> None:
    """`mlx-finetune train`."""
    from mlx_finetune.evaluation.plot import draw_loss
    from mlx_finetune.training.progress import training_progress
    from mlx_finetune.training.run import execute

    plan = _plan_of(file, parse_assignments(list(assignments)) | named, resume)
    config = plan.config
    announce(plan)
    if dry_run:
        result = {"steps": plan.steps, "config": config.to_dict()}
        finish(result, as_json, lambda: show_config(config), None, "the same without --dry-run")
        return
    with training_progress() as advance:
        trained, engine = execute(plan, advance)
    if engine.ranks.rank == 0 and draw_loss(plan.run) is None:
        say("loss.png was not drawn: pip install matplotlib")
    _say_why_it_ended(trained, config, plan.run)
    rate = trained.tokens_learned / trained.seconds if trained.seconds else 0.0
    measured = {"learned_tokens_per_second": rate, "peak_memory": engine.peak_memory()}

    def show() -> None:
        where = engine.device if engine.ranks.size == 1 else f"{engine.device}, {engine.ranks.size} processes"
        print(f"{trained.step} steps on {engine.name} ({where}), {rate:.0f} learned tokens a second")
        print(f"{trained.tokens_seen:,} tokens read, {trained.tokens_computed:,} computed")
        print(f"peak memory {engine.peak_memory() / 1e9:.2f} GB")

    finish(vars(trained) | measured | {"out": str(plan.run)}, as_json, show, plan.run, f"mlx-finetune evaluate {plan.run}")


def _plan_of(file: Path | None, overrides: dict[str, Any], resume: bool) -> "Plan":
    """A new run, or with `resume` the one in `out` from its last checkpoint on."""
    from mlx_finetune.training.run import plan_resume, plan_run

    if not resume:
        return plan_run(load_config(file, overrides))
    if file:
        raise UserError(f"{file}: a resumed run has its own settings", hint="leave the file out, or --resume")
    run = make_config(overrides, "the command line").out
    if not run:
        hint = "mlx-finetune train --resume --out RUN"
        raise UserError("--resume goes on with the run in --out, with its own settings", hint=hint)
    return plan_resume(Path(run), {name: value for name, value in overrides.items() if name != "out"})


def _say_why_it_ended(trained: "Trained", config: RunConfig, run: Path) -> None:
    """Before its last step; raises Exit where it was interrupted."""
    from mlx_finetune.training.memory_watch import COMMANDS, less_memory

    again = f"{COMMANDS[launched()]} train --resume --out {run}"
    if trained.shortage:
        say(f"stopped for want of memory: {trained.shortage}; step {trained.step} of {trained.steps} is saved")
        say(f"next: {less_memory(config)}")
        raise typer.Exit(130)
    if trained.interrupted:
        say(f"interrupted: step {trained.step} of {trained.steps} is saved")
        say(f"next: {again}")
        raise typer.Exit(130)
    if trained.stopped_early:
        say(f"stopped early, at step {trained.step} of {trained.steps}: {trained.stopped_early}")
        say(f"to go on all the same: {again} --patience {2 * config.patience}")


def announce(plan: "Plan") -> None:
    """What a run will do, where, and what it takes of memory and disk.

    Raises:
        UserError: more than there is.
    """
    from mlx_finetune.planning.before_run import check_memory
    from mlx_finetune.training.remarks import experts_left_alone, folds_nothing, looks_at_nothing, untrained_tokens
    from mlx_finetune.training.run import folding_advice, moved, trunk_bytes, why_on_the_cpu
    from mlx_finetune.training.tracking import where_it_goes

    config, dataset = plan.config, plan.dataset
    start = f", going on from {plan.checkpoint.name}" if plan.checkpoint else ""
    say(f"training {config.model} on {len(dataset.train)} examples of {config.data}")
    say(f"{plan.steps} steps{start} -> {plan.run}")
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
