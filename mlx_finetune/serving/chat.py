"""A chat in the terminal: the answer as it is written, the adapter on and off, and the very tokens."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TextIO

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.shown import Run, visible
from mlx_finetune.errors import UserError, no_memory
from mlx_finetune.serving.answer import Answer, Question, Thought, answer
from mlx_finetune.serving.opened import BASE, TUNED, Opened
from mlx_finetune.serving.sampling import Sampling
from mlx_finetune.terminal import say

HELP = {
    "/base": "answer with the base model, the adapter off",
    "/tuned": "answer with the tuned model again",
    "/tokens": "show the last prompt and answer, token by token",
    "/system TEXT": "begin anew with this system prompt; without TEXT, with none",
    "/reset": "begin anew",
    "/help": "show this",
    "/exit": "leave, as Ctrl-D does; Ctrl-C ends an answer",
}


@dataclass(frozen=True)
class Settings:
    """`seed` None: another answer each time, where the temperature is not 0."""

    system: str
    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None


@dataclass
class Chat:
    """One conversation, until it is begun anew."""

    opened: Opened
    settings: Settings
    variant: str = ""
    messages: list[Message] = field(default_factory=list)
    last: tuple[list[int], list[int]] | None = None  # tokens of prompt and answer
    out: TextIO = sys.stdout

    def __post_init__(self) -> None:
        self.variant = self.variant or self.opened.source.variants[0]
        self._begin(self.settings.system)

    def run(self, given: TextIO, out: TextIO) -> None:
        """Reads messages and commands, a line each, until they end."""
        self.out = out
        talking = given.isatty()
        if talking:
            say(f"{self._who()}; /help says what can be typed")
        with edited_lines() if talking else nullcontext():
            while (line := self._line(given, talking)) is not None:
                if line.strip() in ("/exit", "/quit"):
                    return
                if not line.strip():
                    continue
                try:
                    self._take(line.rstrip("\r\n"))
                except KeyboardInterrupt:
                    if not talking:
                        raise
                    say("(interrupted)")

    def _line(self, given: TextIO, talking: bool) -> str | None:
        """The next line; None where there is none. Ctrl-C at the prompt only drops what was typed."""
        while talking:
            try:
                return input(f"{self.variant}> ")
            except EOFError:
                print(file=self.out)
                return None
            except KeyboardInterrupt:
                print(file=self.out)
        line = given.readline()
        return line if line else None

    def _take(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        commands: dict[str, Callable[[], None]] = {
            "/base": lambda: self._switch(BASE),
            "/tuned": lambda: self._switch(TUNED),
            "/tokens": self._show_tokens,
            "/system": lambda: self._begin_anew(rest.strip()),
            "/reset": lambda: self._begin_anew(self.messages[0].content if self._has_system() else ""),
            "/help": self._help,
        }
        if word in commands:
            commands[word]()
        elif word.startswith("/") and word[1:].isalpha():
            say(f"there is no {word}: /help says what there is; a message may begin with a blank and a /")
        else:
            self._answer(line)

    def _answer(self, text: str) -> None:
        asked = [*self.messages, Message("user", text)]
        try:
            question = self._question(asked)
        except (Refused, UserError) as refused:
            say(f"not asked: {refused}")
            return
        said = Answer()
        try:
            spoken = self._spoken(question, said)
        except (RuntimeError, MemoryError) as error:
            if not no_memory(error):
                raise
            self.opened.forget()
            say("no memory left for this answer: /reset begins a shorter conversation")
            return
        if not said.reason:
            say("(interrupted)")
        elif said.reason == "length":
            say(f"(ended after {len(said.tokens)} tokens: --max-tokens, or the context is full)")
        self.last = (question.prompt, said.tokens)
        self.messages = [*asked, Message("assistant", spoken.strip())]

    def _spoken(self, question: Question, said: Answer) -> str:
        """Writes the answer while it comes, up to Ctrl-C; gives it back without the thought before it."""
        spoken: list[str] = []
        thinking = False
        with stoppable() as stopped, closing(answer(self.opened, question, said)) as pieces:
            for piece in pieces:
                if isinstance(piece, Thought):
                    thinking |= bool(piece)
                elif piece:
                    self.out.write("\n\n" if thinking else "")
                    thinking = False
                    spoken.append(piece)
                self.out.write(visible(piece))
                self.out.flush()
                if stopped.is_set():
                    break
        self.out.write("\n")
        self.out.flush()
        return "".join(spoken)

    def _question(self, messages: list[Message]) -> Question:
        """Raises Refused where the template does not take them, UserError where the context is full."""
        prompt = [int(token) for token in self.opened.template.prompt(messages)]
        limit, context, how = self.settings.max_tokens, self.opened.source.context, self.settings
        if context is not None and len(prompt) >= context:
            raise UserError(f"the conversation has {len(prompt)} tokens, and the context is {context}: /reset begins anew")
        limit = limit if context is None else min(limit, context - len(prompt))
        return Question(self.variant, prompt, limit, Sampling(how.temperature, how.top_p, seed=how.seed))

    def _switch(self, variant: str) -> None:
        if variant not in self.opened.source.variants:
            say("this is a model without an adapter: there is nothing to switch")
            return
        self.variant = variant
        say(f"{self._who()}; the conversation goes on")

    def _who(self) -> str:
        source = self.opened.source
        tuned = f"tuned by {source.run} ({source.checkpoint.name})" if source.checkpoint else ""
        return f"{source.config.model}, {tuned if self.variant == TUNED else 'as it is'}"

    def _has_system(self) -> bool:
        return bool(self.messages) and self.messages[0].role == "system"

    def _begin(self, system: str) -> None:
        self.messages = [Message("system", system)] if system else []
        self.last = None

    def _begin_anew(self, system: str) -> None:
        self._begin(system)
        say(f"begun anew, {'with a' if system else 'without'} system prompt")

    def _help(self) -> None:
        for name, what in HELP.items():
            say(f"{name:14} {what}")

    def _show_tokens(self) -> None:
        if self.last is None:
            say("nothing was asked yet")
            return
        prompt, written = self.last
        show_tokens(self.opened, prompt, written, self.out)


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """While inside, the first Ctrl-C only sets the event; the next one interrupts."""
    stopped, before = threading.Event(), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: object) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def edited_lines() -> Iterator[None]:
    """While inside, `input` knows arrow keys, and what was typed before; nothing of it is written to the disk."""
    try:
        import readline
    except ImportError:  # a Python without it
        yield
        return
    readline.set_auto_history(True)
    try:
        yield
    finally:
        readline.clear_history()


def show_tokens(opened: Opened, prompt: list[int], written: list[int], out: TextIO) -> None:
    """Each token between bars, control tokens and what the model wrote in other colours, or between marks."""
    special = set(opened.template.special_ids)
    pieces = opened.template.pieces([*prompt, *written])
    runs = [
        Run((piece,), float(place >= len(prompt)), token in special)
        for place, (token, piece) in enumerate(zip([*prompt, *written], pieces, strict=True))
    ]
    from rich.console import Console
    from rich.text import Text

    console = Console(file=out, markup=False, emoji=False, highlight=False, soft_wrap=True)
    if console.is_terminal and not console.no_color and console.color_system is not None:
        text = Text()
        for run in runs:
            text.append(_bare(run.text), _style(run))
            text.append("|", "dim")
        console.print(text)
    else:
        out.write("|".join(f"⟦{_bare(run.text)}⟧" if run.learned else _bare(run.text) for run in runs) + "\n")
    out.write(f"{len(prompt)} tokens read, {len(written)} written\n")
    out.flush()


def _bare(text: str) -> str:
    return visible(text).replace("\n", "↵\n")


def _style(run: Run) -> str:
    return {(True, False): "bold green", (True, True): "black on green", (False, False): "default", (False, True): "cyan"}[
        run.learned, run.special
    ]
