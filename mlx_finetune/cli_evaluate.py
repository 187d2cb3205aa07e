"""The verb `evaluate` on the command line."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_finetune.evaluation.wanted import LIMIT, SECONDS, STEPS, TURNS


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="Folder that train made; or of a model, with --data.")],
    checkpoint: Annotated[str, typer.Option(help="Of a run: best, latest, or a name such as step-000100.")] = "best",
    data: Annotated[Path | None, typer.Option(help="Of a model: folder that prepare made for it.")] = None,
    test: Annotated[bool, typer.Option("--test", help="Measure on the test split, which no choice was made by.")] = False,
    generate: Annotated[int, typer.Option(min=0, help="Turns to answer at most, of held-out conversations; 0: none.")] = TURNS,
    limit: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = LIMIT,
    gptme_eval: Annotated[
        list[str] | None,
        typer.Option(metavar="SUITE", help="Let both drive gptme through its own tests, such as basic (repeatable)."),
    ] = None,
    gptme: Annotated[str, typer.Option(metavar="PROGRAM", help="gptme-eval, where it is not on the PATH.")] = "",
    tool_format: Annotated[str, typer.Option(help="Of gptme-eval: markdown, xml or tool. Default: that of the run.")] = "",
    sandbox: Annotated[str, typer.Option(help="Of gptme-eval: auto, bwrap, sandbox-exec or none.")] = "auto",
    seconds: Annotated[int, typer.Option(min=1, help="Of gptme-eval: for one test.")] = SECONDS,
    steps: Annotated[int, typer.Option(min=1, help="Of gptme-eval: answers of the model in one test.")] = STEPS,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before what the models write is executed.")] = False,
    engine: Annotated[str, typer.Option("--engine", help="auto, mlx or torch. Default: the one of the run.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
) -> None:
    """Does it drive gptme better? Held-out losses and tool calls of base and tuned model, side by side, with intervals."""
    options = dict(locals())
    from mlx_finetune.evaluating import EvaluateOptions, evaluate_command

    evaluate_command(EvaluateOptions(**options | {"gptme_eval": tuple(gptme_eval or ())}))
