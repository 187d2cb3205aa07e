"""What each verb does, from its checked arguments to the lines that a person reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from mlx_finetune.config import RunConfig, default, load_config, make_config, parse_assignments
from mlx_finetune.data.batches import efficiency
from mlx_finetune.data.dataset import prepared_before
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError
from mlx_finetune.files import refuse_existing
from mlx_finetune.models.hub import check_model_folder, model_folder
from mlx_finetune.models.weights import fingerprint
from mlx_finetune.terminal import finish, progress, say, table


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


def show_dataset(info: dict[str, Any]) -> None:
    """What became of the conversations, as a table."""
    splits = {"training": info["train"], "held out": info["valid"]} | ({"test": info["test"]} if info["examples"]["test"] else {})
    names = {
        "examples": "examples",
        "tokens": "tokens",
        "learned_tokens": "learned tokens",
        "learned_turns": "learned turns",
        "exact_turns": "of them after exactly the tokens that are served",
        "exact_in_one_rendering": "  how many in one rendering a window",
        "turns_of_own_context": "  examples with a context of their own for it",
        "tokens_of_own_contexts": "  and their tokens",
        "served_as_trained": "of them with all that came before",
        "turns_behind_control_text": "turns after the name of a control token, kept as text",
        "placeholder_tokens": "tokens in place of secrets, not learned",
        "turns_too_long": "turns too long for a window, not learned",
        "messages_shortened": "long messages shortened where only read",
        "windows_with_short_prompt": "windows with a part of the system prompt only",
        "messages_left_out": "messages only read that no window had room for",
    }
    rows = [("conversations", *(f"{sum(each['conversations'].values()):,}" for each in splits.values()))]
    for source in info["train"]["learned_tokens_by_source"]:
        counts = (each["learned_tokens_by_source"].get(source, 0) for each in splits.values())
        rows.append((f"learned tokens of {source}", *(f"{count:,}" for count in counts)))
    rows += [(text, *(f"{each[name]:,}" for each in splits.values())) for name, text in names.items()]
    shares = {
        "turn_tokens_learned": "share of the assistant's tokens that is learned",
        "turn_tokens_by_truncation": "  if what is longer than a window were cut off",
    }
    rows += [(text, *(_share(each[name], each["turn_tokens"]) for each in splits.values())) for name, text in shares.items()]
    table("prepared", rows, ("", *splits))
    for each in splits.values():
        for reason, count in each["turns_refused"].items():
            if count:
                print(f"not learned: {count} turns ({reason})")
        for reason, count in each["turns_inexact"].items():
            print(f"learned in another context than is served: {count} turns ({reason})")
    for reason, count in info["left_out"].items():
        print(f"left out: {count} conversations ({reason})")
    if any(each["windows_with_short_prompt"] for each in splits.values()):
        print("a part of the system prompt only: collect --system short has one that fits whole, and that gptme serves")
    if line := _share_line(info):
        print(line)
    if not info["examples"]["valid"]:
        print("nothing is held out: that takes two or more conversations and a valid_fraction")


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _share_line(info: dict[str, Any]) -> str:
    """How much of OpenAssistant there is, and why not as much as was asked; empty where none was to be had."""
    asked, reached = 100 * info["openassistant_share"], 100 * info["openassistant_share_reached"]
    line = f"OpenAssistant: {reached:.1f} % of the learned tokens" if reached else ""
    if not line or asked - reached < 0.1:
        return line
    why = "all there is was taken" if info["openassistant_all_taken"] else "the next would go beyond"
    return f"{line}, asked {asked:g} %: {why}"


def train_command(
    file: Path | None, named: dict[str, str], assignments: Sequence[str], resume: bool, dry_run: bool, as_json: bool
) -> None:
    """`mlx-finetune train`."""
    from mlx_finetune.evaluation.plot import draw_loss
    from mlx_finetune.training.run import execute, plan_resume, plan_run

    overrides = parse_assignments(list(assignments)) | named
    if resume:
        if file:
            raise UserError(f"{file}: a resumed run has its own settings", hint="leave the file out, or --resume")
        run = make_config(overrides, "the command line").out
        overrides.pop("out", None)
        if not run:
            raise UserError(
                "--resume goes on with the run in --out, with its own settings", hint="mlx-finetune train --resume --out RUN"
            )
        plan = plan_resume(Path(run), overrides)
    else:
        plan = plan_run(load_config(file, overrides))
    config, examples = plan.config, len(plan.dataset.train)
    start = f", going on from {plan.checkpoint.name}" if plan.checkpoint else ""
    say(f"training {config.model} on {examples} examples of {config.data}")
    say(f"{plan.steps} steps{start} -> {plan.run}")
    say(f"{100 * efficiency(plan.dataset.train.lengths, config.batch_size, config.seed):.1f} % of the tokens read are no padding")
    if dry_run:
        result = {"steps": plan.steps, "config": config.to_dict()}
        finish(result, as_json, lambda: show_config(config), None, "the same without --dry-run")
        return
    with progress("train") as advance:
        trained, engine = execute(plan, advance)
    picture = draw_loss(plan.run)
    if picture is None:
        say("loss.png was not drawn: pip install matplotlib")
    rate = trained.tokens_learned / trained.seconds if trained.seconds else 0.0
    measured = {"learned_tokens_per_second": rate, "peak_memory": engine.peak_memory()}
    if trained.interrupted:
        say(f"interrupted: step {trained.step} of {trained.steps} is saved")
        say(f"next: mlx-finetune train --resume --out {plan.run}")
        raise typer.Exit(130)

    def show() -> None:
        print(f"{trained.step} steps on {engine.name} ({engine.device}), {rate:.0f} learned tokens a second")
        print(f"peak memory {engine.peak_memory() / 1e9:.2f} GB")

    finish(vars(trained) | measured | {"out": str(plan.run)}, as_json, show, plan.run, f"mlx-finetune evaluate {plan.run}")


def show_config(config: RunConfig) -> None:
    """The resolved settings; those that differ from the default are marked."""
    for name, value in config.to_dict().items():
        print(f"{name}: {value}" + ("" if value == default(name) else "   (set)"))


def evaluate_command(run: Path, checkpoint: str, engine: str, as_json: bool) -> None:
    """`mlx-finetune evaluate`."""
    from mlx_finetune.evaluation.compare import compare

    say(f"held-out loss of {run} ({checkpoint}) and of its base model")
    comparison, _ = compare(run, checkpoint, engine)

    def show() -> None:
        rows = [(s, f"{b:.4f}", f"{comparison.tuned.by_source[s]:.4f}") for s, b in comparison.base.by_source.items()]
        rows.append(("the loss (OpenAssistant apart)", f"{comparison.base.loss:.4f}", f"{comparison.tuned.loss:.4f}"))
        title = f"held-out loss, nats a token, {comparison.base.tokens} learned tokens, {comparison.checkpoint}"
        table(title, rows, ("source", "base", "tuned"))

    finish(comparison.to_json(), as_json, show, run / "evaluation.json", f"mlx-finetune fuse {run} --out model")


def plot_command(run: Path, as_json: bool) -> None:
    """`mlx-finetune plot`."""
    from mlx_finetune.evaluation.plot import draw_loss

    picture = draw_loss(run)
    if picture is None:
        raise UserError("matplotlib is not installed", hint="pip install matplotlib")
    finish({"picture": str(picture)}, as_json, lambda: None, picture, "")


def fuse_command(run: Path, out: Path, checkpoint: str, as_json: bool) -> None:
    """`mlx-finetune fuse`."""
    from mlx_finetune.evaluation.compare import open_run
    from mlx_finetune.export.verify import PROBE_TEXTS, fuse_and_verify
    from mlx_finetune.training.checkpoint import trained_template

    refuse_existing(out)
    _, model, folder = open_run(run, checkpoint)
    say(f"adding {folder} to the weights of {model}, into {out}")
    with progress("fuse") as advance:
        fused, verified = fuse_and_verify(model, folder, out, PROBE_TEXTS, advance, trained_template(run))
    result = {"fused": vars(fused), "verified": vars(verified), "out": str(out)}

    def show() -> None:
        print(f"{fused.tensors} tensors changed; verified by {verified.backend}: no missing and no unexpected keys,")
        print(f"largest logit difference from base + adapter {verified.largest_difference:.1e}, allowed {verified.tolerance:.1e}")

    finish(result, as_json, show, out, "use the folder like any Hugging Face model")
