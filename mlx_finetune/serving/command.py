"""The verbs `serve` and `chat`, from their checked arguments to the lines that a person reads."""

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from io import TextIOWrapper

from mlx_finetune.data.policies import POLICIES, policy_of
from mlx_finetune.errors import UserError
from mlx_finetune.serving.admission import is_local
from mlx_finetune.serving.chat import Chat, Settings
from mlx_finetune.serving.http import Front
from mlx_finetune.serving.listening import http_server, listening, url_of
from mlx_finetune.serving.opened import Opened, Source, find_source
from mlx_finetune.serving.served import Served
from mlx_finetune.serving.trained import gptme_command
from mlx_finetune.serving.worker import Worker
from mlx_finetune.terminal import say, waiting

KEY = "MLX_FINETUNE_API_KEY"


@dataclass(frozen=True)
class ServeOptions:
    """The options of `serve`."""

    run: str
    checkpoint: str
    engine: str
    host: str
    port: int
    max_tokens: int
    name: str
    api_key: str
    no_key: bool
    as_json: bool


def serve_command(options: ServeOptions) -> None:
    """`mlx-finetune serve`."""
    check_installed()
    key = key_of(options)
    source = find_source(options.run, options.checkpoint, options.engine)
    served = Served(source, source.named(options.name), options.max_tokens)
    with listening(options.host, options.port) as listener:
        if not is_local(options.host):
            warn(options.host, bool(key))
        worker = Worker(lambda: Opened(source))
        with waiting(f"loading {source.checkpoint or source.model}"):
            worker.start()
        front = Front(served, worker, key, local=is_local(options.host))
        try:
            url = url_of(listener, options.host)
            http_server(front, lambda: announce(served, url, key, options.as_json)).run(sockets=[listener])
        finally:
            worker.stop()


def key_of(options: ServeOptions) -> str:
    """What every request has to bring; empty: nothing.

    Raises:
        UserError: other machines would reach the server, and there is no key, and that was not asked for by name.
    """
    key = (options.api_key or os.environ.get(KEY, "")).strip()
    if options.no_key and key:
        raise UserError("--no-key, and there is a key", hint=f"leave out --no-key, or --api-key and {KEY}")
    if not (key or options.no_key or is_local(options.host)):
        hint = f"set {KEY} to a long random word, or --no-key where everybody there may use the model"
        raise UserError(f"--host {options.host}: other machines would reach this server, and no key is asked for", hint=hint)
    return key


def check_installed() -> None:
    """Raises UserError where what answers requests is not installed."""
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"serve needs {package}, which is not installed", hint="pip install 'mlx-finetune[serve]'")


def warn(host: str, with_key: bool) -> None:
    say(f"--host {host}: other machines reach this server, without encryption" + ("" if with_key else ", and no key is asked for"))
    if not with_key:
        say("whoever reaches it can use the model, and ask it for what it learned from")


def announce(served: Served, url: str, key: str, as_json: bool) -> None:
    """Where the server is, what it serves, and how gptme talks to it."""
    source = served.source
    command = gptme_command(served.name, source.trained, url, f"${KEY}" if key else "none")
    policy = policy_of(source.template.source) or POLICIES[0].name
    if as_json:
        about = {"url": url, "models": list(served.variants), "context_length": source.context, "gptme": command}
        print(json.dumps(about | {"role_policy": policy, "tool_format": source.trained.tool_format or None}), flush=True)
        return
    context = f"{source.context:,} tokens" if source.context else "as much as fits in memory"
    print(f"{url}/v1   models: {', '.join(served.variants)}   context: {context}   roles: {policy}")
    print(command, flush=True)
    for line in _remarks(source):
        say(line)


def _remarks(source: Source) -> list[str]:
    trained = source.trained
    lines = []
    if source.run and not trained.known:
        lines.append(f"{source.config.data}: the data of the run is not there: its tool format is not known, markdown is a guess")
    elif not source.run:
        lines.append("which tool format a model writes cannot be seen in its folder: markdown is a guess")
    elif not trained.tool_format:
        lines.append("no conversation of the run calls a tool: the format is a guess")
    lines.append("gptme's own default for local models is --tool-format tool; without a network set GPTME_TIKTOKEN_TIMEOUT=0")
    lines.append("Ctrl-C ends it")
    return lines


@dataclass(frozen=True)
class ChatOptions:
    """The options of `chat`."""

    run: str
    checkpoint: str
    engine: str
    system: str
    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None


def chat_command(options: ChatOptions) -> None:
    """`mlx-finetune chat`."""
    source = find_source(options.run, options.checkpoint, options.engine)
    settings = Settings(options.system, options.temperature, options.top_p, options.max_tokens, options.seed)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # of a terminal that is not in UTF-8
    with waiting(f"loading {source.checkpoint or source.model}"):
        opened = Opened(source)
    Chat(opened, settings).run(sys.stdin, sys.stdout)
