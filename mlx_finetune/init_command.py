"""`mlx-finetune init`: looks, asks, and writes a config.yaml for `mlx-finetune run`. Nothing is downloaded."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_finetune.collected import CHARACTERS_A_TOKEN
from mlx_finetune.config import default
from mlx_finetune.data.sources.gptme import default_logs_folder
from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_file, refuse_existing
from mlx_finetune.init_questions import (
    NONE,
    OPENASSISTANT,
    Ask,
    Logs,
    Model,
    ask,
    chat_files,
    exports,
    logs_in,
    model_of,
    show_models,
    take_default,
    yes_or_no,
)
from mlx_finetune.planning.advice import Wanted, gb
from mlx_finetune.planning.candidates import PASS, advised, candidates
from mlx_finetune.planning.command import Plan, settings_of
from mlx_finetune.planning.doctor.engines import machine_here
from mlx_finetune.planning.machine import Machine
from mlx_finetune.planning.memory import LEARNED_SHARE
from mlx_finetune.planning.wording import duration, reasons
from mlx_finetune.road import commented, seen_from
from mlx_finetune.terminal import finish, say

MLX_ONLY = ("attention",)  # of the plan's settings
BITS = {8: "8bit", 4: "4bit"}  # as bitsandbytes quantises on CUDA


@dataclass(frozen=True)
class InitOptions:
    """The options of the verb, as given."""

    file: Path
    yes: bool
    model: str
    logs: Path | None
    chat: list[str] | None
    openassistant: list[str] | None
    to: list[str] | None
    as_json: bool


def init_command(options: InitOptions) -> None:
    """From options and answers to the file, which appears whole or not at all."""
    refuse_existing(options.file, hint="choose another FILE, or move the old one away")
    if not options.yes and not sys.stdin.isatty():
        raise UserError("init asks questions, and there is no terminal to answer on", "mlx-finetune init --yes takes the defaults")
    asking: Ask = take_default if options.yes else ask
    machine, engine = machine_here()
    say(f"{machine.name}: {gb(machine.usable)} may be used ({machine.rule}); auto takes {engine}")
    collect, logs = _conversations(options, asking)
    tokens = round(logs.size / CHARACTERS_A_TOKEN) or PASS
    model = _model(options, asking, machine, tokens)
    handed = asking(
        "Hand back, beside the Hugging Face folder: peft, mlx-lm, gguf, ollama", ",".join(options.to or [NONE]), exports
    )
    values = _values(model, machine, engine) | ({"collect": collect} if collect else {})
    back: dict[str, Any] = ({"export": list(handed)} if handed else {}) | _original(model, engine)
    values = seen_from(values | ({"hand_back": back} if back else {}), options.file.absolute().parent.resolve())
    text = commented(values, _remarks(model, machine, engine, tokens))
    with atomic_file(options.file) as file:
        file.write(text)
    result = {"config": str(options.file), "model": values["model"], "conversations": logs.conversations, "machine": machine.name}
    finish(result, options.as_json, lambda: None, options.file, f"mlx-finetune run {options.file}")


def _conversations(options: InitOptions, asking: Ask) -> tuple[dict[str, Any], Logs]:
    """The section `collect`, without what is its default; there is always something to read."""
    usual = default_logs_folder(os.environ, Path.home(), sys.platform)
    while True:
        logs = asking("Folder of your gptme conversations, or none", _logs_found(options, usual), logs_in)
        if logs.folder:
            say(f"  {logs.conversations:,} conversations, {logs.size / 1e6:.1f} MB")
        given = ",".join(options.chat or []) or NONE
        chats = asking("Other chat files, or none", given, chat_files) if options.chat or not logs.folder else ()
        trees = tuple(options.openassistant or ())
        if not trees and asking(f"OpenAssistant too ({OPENASSISTANT}, read from the Hub)?", "n", yes_or_no):
            trees = (OPENASSISTANT,)
        if logs.folder or chats or trees:
            break
        if options.yes:
            raise UserError(f"no gptme conversations in {usual}", "mlx-finetune init --logs FOLDER, or --chat FILE")
        say("  nothing to learn from: name at least one of them")
    own = logs.folder is not None and logs.folder.absolute() == usual.absolute()
    found: dict[str, Any] = {} if own else {"logs": str(logs.folder.resolve())} if logs.folder else {"gptme": False}
    return found | {name: list(value) for name, value in (("chat", chats), ("openassistant", trees)) if value}, logs


def _logs_found(options: InitOptions, usual: Path) -> str:
    """The default: the folder given, else gptme's own where there are conversations in it."""
    if options.logs:
        return str(options.logs)
    try:
        logs_in(str(usual))
    except UserError as error:
        say(f"  {error.message}")
        return NONE
    return str(usual)


def _model(options: InitOptions, asking: Ask, machine: Machine, tokens: int) -> Model:
    found = candidates(machine)
    if options.model:
        return model_of(options.model, found, machine)
    best = advised(found, machine, tokens)
    if best is None:
        raise UserError(f"{machine.name}: no model of the list fits into {gb(machine.usable)}", "name a smaller one with --model")
    if asking is ask:
        told = f"and how long one pass over some {tokens:,} tokens takes" if machine.chip else "how fast this machine is: not known"
        say(f"Models (* is advised), {told}:")
        show_models(found, best, tokens)
    number = str(found.index(best) + 1)
    return asking("Model: a number, a folder, or a hub id", number, lambda text: model_of(text, found, machine))


def _values(model: Model, machine: Machine, engine: str) -> dict[str, Any]:
    """Settings of the run, without those that are their default."""
    known = model.known
    if known is None or not known.choice.fits:
        return {"model": model.name}
    planned = settings_of(Plan(machine, known.choice, (), known.speed), known.shape)
    chosen = {name: value for name, value in planned.items() if value != default(name)}
    if engine == "mlx":
        return {"model": known.packed or model.name} | chosen
    chosen = {name: value for name, value in chosen.items() if name not in MLX_ONLY}
    bits = BITS.get(known.choice.dials.bits) if machine.on_gpu and not known.shape.quantisation else None
    return {"model": model.name} | chosen | ({"quantization": bits} if bits else {})


def _original(model: Model, engine: str) -> dict[str, Any]:
    """Of quantised weights those that they were made from: what was learned is added to them."""
    return {"original": model.name} if engine == "mlx" and model.known and model.known.packed else {}


def _remarks(model: Model, machine: Machine, engine: str, tokens: int) -> tuple[str, ...]:
    known = model.known
    made = f"Made by mlx-finetune init for {machine.name}."
    if known is None:
        return made, f"Whether {model.name} fits was not looked at: mlx-finetune plan --model {model.name}"
    why = reasons(known.shape, machine, known.choice, Wanted(default("max_length"), LEARNED_SHARE), None)
    if engine == "torch":  # which has attention of its own
        why = tuple(line for line in why if not line.startswith("attention"))
    time = (f"one pass over some {tokens:,} tokens: {duration(known.speed, tokens)}",) if known.speed else ()
    return made, *why, *time
