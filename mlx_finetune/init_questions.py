"""What `init` asks: each question with a default, asked again until the answer is one; with --yes the defaults are taken."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import typer

from mlx_finetune.config import checked
from mlx_finetune.data.sources.gptme import find_logs
from mlx_finetune.errors import UserError
from mlx_finetune.models.hub import HUB_ID, check_model_folder, model_folder
from mlx_finetune.planning.candidates import Candidate, candidate
from mlx_finetune.planning.machine import Machine
from mlx_finetune.planning.model_shape import model_shape
from mlx_finetune.planning.wording import duration
from mlx_finetune.road import HandBack
from mlx_finetune.terminal import say

NONE = "none"
OPENASSISTANT = "OpenAssistant/oasst2"
Answer = TypeVar("Answer")


class Ask(Protocol):
    """A question, the answer that Enter gives, and what makes a value of an answer or raises UserError."""

    def __call__(self, question: str, default: str, parse: Callable[[str], Answer]) -> Answer: ...


def ask(question: str, default: str, parse: Callable[[str], Answer]) -> Answer:
    """On the terminal. Raises Abort at Ctrl-C, and where the input ends."""
    while True:
        print(f"{question} [{default}]: ", end="", file=sys.stderr, flush=True)
        try:
            text = input().strip() or default
        except (EOFError, KeyboardInterrupt) as error:
            print(file=sys.stderr)
            raise typer.Abort from error
        try:
            return parse(text)
        except UserError as error:
            say(f"  {error.message}" + (f"; {error.hint}" if error.hint else ""))


def take_default(question: str, default: str, parse: Callable[[str], Answer]) -> Answer:
    """With --yes: what is no answer is refused."""
    return parse(default)


@dataclass(frozen=True)
class Logs:
    """gptme's, counted."""

    folder: Path | None  # None: there are none
    conversations: int = 0
    size: int = 0  # bytes


def logs_in(text: str) -> Logs:
    """`none`, or a folder with conversations in it."""
    if text == NONE:
        return Logs(None)
    folder = Path(text).expanduser()
    found, _ = find_logs(folder)
    return Logs(folder, len(found), sum(log.size for log in found))


def chat_files(text: str) -> tuple[str, ...]:
    """`none`, or files, folders and hub ids with commas between."""
    names = [name.strip() for name in text.split(",") if name.strip() not in ("", NONE)]
    for name in names:
        if not Path(name).expanduser().exists() and not HUB_ID.fullmatch(name):
            raise UserError(f"{name}: no such file", "name files or folders, with commas between, or none")
    return tuple(str(Path(name).expanduser().resolve()) if Path(name).expanduser().exists() else name for name in names)


def yes_or_no(text: str) -> bool:
    """As people type it."""
    if text.lower() not in ("y", "yes", "n", "no"):
        raise UserError(f"{text}: neither yes nor no", "type y or n")
    return text.lower().startswith("y")


def exports(text: str) -> tuple[str, ...]:
    """`none`, or formats with commas between, checked as the file's are."""
    names = [name.strip() for name in text.split(",") if name.strip() not in ("", NONE)]
    return checked(HandBack, {"export": names}, "hand_back").export


@dataclass(frozen=True)
class Model:
    """The answer: what the file calls it, and what is known of it on this machine."""

    name: str
    known: Candidate | None


def model_of(text: str, found: Sequence[Candidate], machine: Machine) -> Model:
    """A number of the list, the name of one in it, a folder, or any hub id; nothing is downloaded."""
    if text.isdigit() and not Path(text).exists():
        if not 1 <= int(text) <= len(found):
            raise UserError(f"{text}: no such number", f"1 to {len(found)}, a folder, or a hub id such as org/name")
        return Model(found[int(text) - 1].shape.name, found[int(text) - 1])
    for one in found:
        if text.lower() in (one.shape.name.lower(), one.shape.name.partition("/")[2].lower()):
            return Model(one.shape.name, one)
    if HUB_ID.fullmatch(text) and not Path(text).expanduser().exists():
        return Model(text, None)
    folder = model_folder(text)
    check_model_folder(folder)
    try:
        return Model(str(folder.resolve()), candidate(model_shape(str(folder)), machine))
    except UserError as error:  # trained all the same: what a plan knows less of than an engine
        say(f"no plan for it: {error.message}")
        return Model(str(folder.resolve()), None)


def show_models(found: Sequence[Candidate], advised: Candidate | None, tokens: int) -> None:
    """The list that the question is about, on stderr."""
    for number, one in enumerate(found, 1):
        dials = one.choice.dials
        if one.choice.fits:
            layers = f"{dials.num_layers} layers" if dials.num_layers else "all layers"
            time = duration(one.speed, tokens).partition(" (")[0]
            told = f"{dials.bits:>2} bits  windows of {dials.max_length:>5,}  {layers}  {time if one.speed else ''}"
        else:
            told = "does not fit"
        mark = "*" if one is advised else " "
        say(f" {mark}{number} {one.shape.name.partition('/')[2]:<29} {told}".rstrip())
