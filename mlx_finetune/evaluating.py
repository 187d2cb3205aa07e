"""The verb `evaluate`: base and tuned model on what was held out, as a table that needs no knowledge of statistics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.compare import Comparison, compare, measure_model
from mlx_finetune.evaluation.losses import Row
from mlx_finetune.evaluation.wanted import LIMIT, SECONDS, STEPS, Wanted
from mlx_finetune.terminal import Done, progress, say, table

TITLES = {"all": "all learned tokens", "gptme": "gptme conversations", "openassistant": "OpenAssistant", "chat": "chat files"}
TITLES |= {"first of a turn": "first token of a turn", "stop": "token that ends a turn"}
INDENT = {"all": "", "source": "  of ", "kind": "  ", "turn": "  turns, "}
LARGE = 700  # nats: its perplexity would be no number
OF_GPTME_EVAL = ("gptme", "tool_format", "sandbox", "seconds", "steps")  # options that mean nothing without it
FEW = 10  # conversations; the range of fewer says too much
EXPLAINED = (
    "Loss: how surprised the model is by each token of the log's own answers, in nats: 0 is not at all, lower is better.",
    "Perplexity: among how many equally likely tokens it seems to choose.",
    "Difference: tuned minus base. 95 % range: where it lies for other conversations like these, in 95 of 100 such measurements.",
    "*: the range does not hold 0, so that chance is no likely reason for the difference.",
)


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of the verb, as they stand on the command line."""

    run: Path
    checkpoint: str = "best"
    data: Path | None = None
    test: bool = False
    generate: int = 0
    limit: int = LIMIT
    gptme_eval: tuple[str, ...] = ()
    gptme: str = ""
    tool_format: str = ""
    sandbox: str = "auto"
    seconds: int = SECONDS
    steps: int = STEPS
    yes: bool = False
    engine: str = ""
    as_json: bool = False


def evaluate_command(options: EvaluateOptions) -> None:
    """`mlx-finetune evaluate`."""
    evaluated(options).finish(options.as_json)


def evaluated(options: EvaluateOptions) -> Done:
    """Measures, and writes what was found into a run."""
    _refuse_what_has_no_effect(options)
    wanted = Wanted("test" if options.test else "valid", options.generate, options.limit)
    what = "test split" if options.test else "held-out conversations"
    answers = f", and answers to up to {wanted.generate} turns" if wanted.generate else ""
    if options.data is not None:
        comparison = _of_model(options, wanted, f"losses{answers} of {options.run} alone on the {what} of {options.data}")
        made, following = None, f"mlx-finetune train --model {options.run} --data {options.data} --out run"
    else:
        if not (options.run / "config.yaml").is_file() and (options.run / "config.json").is_file():
            raise UserError(f"{options.run}: a model, not a run", hint="--data DATASET measures it on what that holds out")
        comparison = _of_run(
            options, wanted, f"losses{answers} of {options.run} ({options.checkpoint}) and of its base model on the {what}"
        )
        made, following = options.run / "evaluation.json", f"mlx-finetune report {options.run}"
    return Done(comparison.to_json(), lambda: show(comparison), made, following)


def _refuse_what_has_no_effect(options: EvaluateOptions) -> None:
    for name in (one.name for one in fields(options) if getattr(options, one.name) != one.default):
        told = f"--{name.replace('_', '-')}"
        if name in OF_GPTME_EVAL and not options.gptme_eval:
            raise UserError(f"{told} is of gptme-eval", hint=f"add --gptme-eval SUITE, or leave {told} out")
        if name == "checkpoint" and options.data is not None:
            raise UserError(f"{told} is of a run, and --data of a model", hint="leave one of them out")


def _of_run(options: EvaluateOptions, wanted: Wanted, doing: str) -> Comparison:
    plan = None
    if options.gptme_eval:
        from mlx_finetune.gptme_evaluating import GptmeOptions, measure_gptme_eval, plan_gptme_eval

        how = options.sandbox, options.seconds, options.steps, options.yes
        asked = GptmeOptions(options.gptme_eval, options.gptme, options.tool_format, *how)
        plan = plan_gptme_eval(options.run, options.checkpoint, options.engine, asked)
    say(doing)
    comparison = compare(options.run, options.checkpoint, options.engine, wanted, progress)[0]  # its engine is let go of
    return replace(comparison, gptme_eval=measure_gptme_eval(plan)) if plan else comparison


def _of_model(options: EvaluateOptions, wanted: Wanted, doing: str) -> Comparison:
    assert options.data is not None
    if options.gptme_eval:
        raise UserError("--gptme-eval compares the base and the tuned model of a run", hint="leave --data out")
    if (options.run / "config.yaml").is_file():
        raise UserError(f"--data {options.data}: a run has its own data", hint="leave --data out")
    say(doing)
    return measure_model(options.run, options.data, options.engine, wanted, progress)


def show(comparison: Comparison) -> None:
    """Losses, then rates, then what the numbers mean."""
    conversations, alone = comparison.rows[0].conversations, comparison.tuned is None
    where = f"{comparison.checkpoint} on {comparison.engine}" if comparison.checkpoint else comparison.engine
    held_out = f"{comparison.split} split, {_count(conversations, 'conversation')}"
    header = ("", "tokens", "model") if alone else ("", "tokens", "base", "tuned", "difference", "95 % range")
    rows = [_loss_row(row)[: len(header)] for row in comparison.rows]
    table(f"held-out loss, nats a token (perplexity): {where}, {held_out}", rows, header)
    if comparison.generation:
        _show_rates(comparison.generation, alone)
    if comparison.gptme_eval:
        from mlx_finetune.gptme_evaluating import show_gptme_eval

        show_gptme_eval(comparison.gptme_eval)
    lines = [*EXPLAINED[:2], *(() if alone else EXPLAINED[2:])]
    if conversations < FEW and not alone:
        lines.append(f"Only {_count(conversations, 'conversation')} held out: the true ranges are wider than these.")
    for line in [*lines, *filter(None, [comparison.note])]:
        print(line)


def _loss_row(row: Row) -> tuple[str, ...]:
    name = INDENT[row.group] + TITLES.get(row.name, row.name)
    difference = _difference((row.difference, row.low, row.high), "{:+.4f}")
    return name, f"{row.tokens:,}", _loss(row.base), _loss(row.tuned), *difference


def _loss(loss: float | None) -> str:
    if loss is None:
        return "-"
    return f"{loss:.4f} ({math.exp(loss):.4g})" if loss < LARGE else f"{loss:.4f}"


def _difference(found: Sequence[float | None], form: str) -> tuple[str, str]:
    """The difference and its range; a star where that does not hold 0."""
    value, low, high = found
    if value is None:
        return "-", "-"
    if low is None or high is None:
        return form.format(value), "one conversation"
    sure = "*" if low > 0 or high < 0 else ""
    return form.format(value) + sure, f"{form.format(low)} to {form.format(high)}"


def _show_rates(generation: dict[str, Any], alone: bool) -> None:
    turns, conversations = _count(generation["turns"], "turn"), _count(generation["conversations"], "conversation")
    title = f"what it writes: answers to {turns} of {conversations}, at most {generation['limit']} tokens each; higher is better"
    header = ("share of answers", "model") if alone else ("share of answers", "base", "tuned", "difference", "95 % range")
    table(title, [_rate_row(rate)[: len(header)] for rate in generation["rates"]], header)
    if left_out := generation["left_out"]:
        print(f"{_count(left_out, 'turn')} not asked: longer than the limit in the log, or with native calls that cannot be read")


def _rate_row(rate: dict[str, Any]) -> tuple[str, ...]:
    shares = _share(rate["base"], rate["of_base"]), _share(rate["tuned"], rate["of_tuned"])
    percent = [None if rate[key] is None else 100 * rate[key] for key in ("difference", "low", "high")]
    return rate["name"], *shares, *_difference(percent, "{:+.0f} %")


def _share(share: float | None, of: int) -> str:
    return "-" if share is None else f"{round(share * of)} of {of} ({100 * share:.0f} %)"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
