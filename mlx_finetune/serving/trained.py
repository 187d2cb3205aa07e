"""What a server has to know of a run: how its conversations call tools, and which gptme asks as they did."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from mlx_finetune.config import RunConfig
from mlx_finetune.data.conversation import LONGEST_CHAT, Message
from mlx_finetune.data.policies import policy_of
from mlx_finetune.data.system_prompt import describe
from mlx_finetune.data.tool_calls import format_of
from mlx_finetune.errors import UserError
from mlx_finetune.reading import lines_of, open_ordinary

ENOUGH = 200  # conversations that are looked at
FOLDED_NAMES = ("qwen3.5", "qwen3_5")  # gptme 0.35.1, models/types.py: names for which it folds later system messages


@dataclass(frozen=True)
class Trained:
    """What the conversations of a run say; all empty where they are not there any more, or where there was no run."""

    tool_format: str = ""  # markdown, xml or tool, by most of gptme's conversations
    native: bool = False  # calls of the format tool stand in them as native tool_calls, not as text
    schemas: bool = False  # some of them were given the schemas of tools
    options: tuple[str, ...] = ()  # of gptme, with which it sends the system prompt that most of them have
    known: bool = False  # there were conversations to look at

    @property
    def calls_as_text(self) -> bool:
        """Whether it learned the calls of the format tool as gptme's text for them."""
        return self.known and self.tool_format == "tool" and not self.native


def read_trained(config: RunConfig) -> Trained:
    """Looks at the training conversations of the run, where the folder is still there."""
    path = Path(config.data) / "train.jsonl"
    if not config.data or not path.is_file():
        return Trained()
    formats: Counter[str] = Counter()
    options: Counter[tuple[str, ...]] = Counter()
    native = schemas = False
    for row in _rows(path):
        answers = [m for m in row["messages"] if m.get("role") == "assistant"]
        calls = any(m.get("tool_calls") for m in answers)
        schemas |= bool(row.get("tools"))
        native |= calls
        found = "tool" if calls else format_of(str(m.get("content", "")) for m in answers)
        if found:
            formats[found] += 1
        options[_options(row["messages"])] += 1
    return Trained(_most(formats) or "", native, schemas, _most(options) or (), True)


def _most(counts: Counter[Any]) -> Any:
    return counts.most_common(1)[0][0] if counts else None


def _options(messages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Which system prompt and tools the conversation was had with, as gptme's options; empty where that cannot be told."""
    leading = [Message("system", str(m.get("content", ""))) for m in takewhile(lambda m: m.get("role") == "system", messages)]
    prompt = describe(leading)
    if prompt.reason:
        return ()
    system = ("--system", prompt.kind) if prompt.kind in ("full-noexamples", "short") else ()  # the full one is gptme's default
    return system + (("--tools", ",".join(prompt.tools)) if prompt.tools else ())


def _rows(path: Path) -> list[dict[str, Any]]:
    """One line of each of gptme's conversations, or of the others where none is gptme's; of many, the first."""
    of_gptme: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    seen: set[Any] = set()
    with open_ordinary(path) as file:
        for line in lines_of(file, LONGEST_CHAT):
            try:
                row = json.loads(line.raw or b"")
                messages, name = row["messages"], str(row.get("conversation"))
                if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
                    raise ValueError("messages are a list of objects")
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise UserError(f"{path}:{line.number}: not a line that prepare wrote", hint="prepare the data again") from error
            if name not in seen:
                (of_gptme if row.get("source") == "gptme" else others).append(row)
                seen.add(name)
            if len(of_gptme) == ENOUGH:
                break
    return of_gptme or others[:ENOUGH]


def gptme_command(name: str, trained: Trained, url: str, key: str = "none") -> str:
    """What a person types so that gptme asks the server at `url` as the conversations of the run were had. `key`: for a shell."""
    words = ["gptme", "-m", f"local/{name}", "--tool-format", trained.tool_format or "markdown", *trained.options]
    return f"OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key} {shlex.join(words)}"


def folds(template: str) -> bool:
    """Whether the template makes later system messages what gptme makes of them where it folds."""
    return policy_of(template).startswith("folded")


def named_as_folded(name: str) -> bool:
    """Whether gptme folds for a model of this name."""
    return any(mark in name.lower() for mark in FOLDED_NAMES)


def served_name(model: str, run: Path | None, template: str, told: str = "") -> str:
    """The name of the model for clients: told by the person, or made of those of the model and the run's folder.

    Raises:
        UserError: for the name that was told gptme would send other messages than the model was trained with.
    """
    fold = folds(template)
    if told:
        if not re.fullmatch(r"[\w.:@+-]{1,100}", told):
            raise UserError(f"--name {told!r:.60}: a name is of letters, digits and . : @ + - _", hint="leave it out for one")
        if named_as_folded(told) != fold:
            what = "folds system messages for names with qwen3.5" + (", and the model needs that" if fold else ", and for no other")
            hint = "add qwen3.5 to the name" if fold else "take qwen3.5 out of the name"
            raise UserError(f"--name {told}: gptme {what}", hint=f"{hint}, or leave --name out")
        return told
    folder = run.resolve().name if run else ""
    parts = (re.sub(r"[^a-z0-9.-]+", "-", Path(part).name.lower()).strip("-.") for part in (model, folder))
    name = "-".join(filter(None, parts)) or "model"
    if fold and not named_as_folded(name):
        return f"{name}-folded-as-qwen3.5"
    return name if fold else re.sub(r"qwen3[._]5", "qwen3-5", name)
