"""The verbs `serve` and `chat` on the command line."""

from typing import Annotated

import typer

from mlx_finetune.serving.defaults import HOST, MAX_TOKENS, PORT

Place = Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Folder that train made, a model folder, or a hub id.")]
Checkpoint = Annotated[str, typer.Option("--checkpoint", help="Of a run: best (the default), latest, or such as step-000100.")]
RunEngine = Annotated[str, typer.Option("--engine", help="auto, mlx or torch. Default: the one of the run.")]


def serve(
    run: Place,
    checkpoint: Checkpoint = "",
    engine: RunEngine = "",
    host: Annotated[
        str, typer.Option(help="Address to bind; any other than the default lets other machines in, with a key.")
    ] = HOST,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = PORT,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of an answer, where the request does not say (gptme does not).")
    ] = MAX_TOKENS,
    name: Annotated[str, typer.Option(help="What the model is called. Default: after the model and the run.")] = "",
    api_key: Annotated[
        str,
        typer.Option(
            "--api-key", help="Asked of every request. Better: the variable MLX_FINETUNE_API_KEY, which no list of programs shows."
        ),
    ] = "",
    no_key: Annotated[bool, typer.Option("--no-key", help="With --host: let other machines in without a key.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print where it is as one JSON object on stdout.")] = False,
) -> None:
    """Serve a run, and its base, to gptme and other clients of OpenAI's API; prints the gptme command to use."""
    options = dict(locals())
    from mlx_finetune.serving.command import ServeOptions, serve_command

    serve_command(ServeOptions(**options))


def chat(
    run: Place,
    checkpoint: Checkpoint = "",
    engine: RunEngine = "",
    system: Annotated[str, typer.Option(help="System prompt. Default: none.")] = "",
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Of the likeliest tokens, so much together.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = MAX_TOKENS,
    seed: Annotated[int | None, typer.Option(min=0, help="The same answers each time, where the temperature is not 0.")] = None,
) -> None:
    """Talk to a run in the terminal: /base and /tuned switch its adapter off and on, /tokens shows the very tokens."""
    options = dict(locals())
    from mlx_finetune.serving.command import ChatOptions, chat_command

    chat_command(ChatOptions(**options))
