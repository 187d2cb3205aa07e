"""What a person chooses to learn from: by time, tool, format, model, title, and by a file of tags."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from mlx_finetune.data.conversation import LEAST_WEIGHT, MOST_WEIGHT, Conversation
from mlx_finetune.data.sources.log_files import open_regular
from mlx_finetune.data.turns import calls_of
from mlx_finetune.errors import UserError

KEEP, DROP = "keep", "drop"
TAGS_HINT = "a line is `NAME: keep`, `NAME: drop` or `NAME: 2.5` (a weight); collect writes such a file, tags.yaml"
Tag = str | float  # keep, drop, or a weight


@dataclass(frozen=True)
class Selection:
    """All that was asked for; an empty field asks for nothing. Times are ISO 8601 in UTC, patterns those of a shell.

    Times, tools, formats, models and titles choose among a person's own conversations (gptme logs and chat files), not among
    OpenAssistant's; `exclude` and `tags` are names, ids or patterns of them and mean every source.
    """

    since: str = ""
    until: str = ""
    tools: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    titles: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    tags: Mapping[str, Tag] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As it stands in collect.json."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def tag(self, conversation: Conversation) -> Tag | None:
        """What the tags file says of it; its own name wins over a pattern, a later line over an earlier one."""
        for own in (conversation.name, conversation.id):
            if own in self.tags:
                return self.tags[own]
        return next((tag for pattern, tag in reversed(list(self.tags.items())) if _names(pattern, conversation)), None)

    def reason_to_leave(self, conversation: Conversation) -> str | None:
        """Why it was not asked for; None where it was."""
        tag = self.tag(conversation)
        if tag in (DROP, 0):
            return "not selected: dropped by the tags file"
        if any(_names(pattern, conversation) for pattern in self.exclude):
            return "not selected: --exclude"
        if tag is not None or conversation.source == "openassistant":
            return None
        meta = conversation.meta
        time, model = str(meta.get("time") or ""), str(meta.get("model") or "")
        if (self.since and time < self.since) or (self.until and not "" < time < self.until):
            return "not selected: outside --since and --until"
        if self.formats and meta.get("tool_format") not in self.formats:
            return "not selected: another --format"
        if self.models and not any(_like(pattern, model) for pattern in self.models):
            return "not selected: another --from-model"
        if self.titles and not any(_like(p, str(meta.get("title") or "")) or _like(p, conversation.name) for p in self.titles):
            return "not selected: another --title"
        if self.tools and not tools_used(conversation) & set(self.tools):
            return "not selected: no call of --tool"
        return None


def tools_used(conversation: Conversation) -> frozenset[str]:
    """Names of the tools that its assistant turns call."""
    turns = [message for message in conversation.messages if message.role == "assistant"]
    native = {call.name for message in turns for call in message.tool_calls}
    tool_format = str(conversation.meta.get("tool_format") or "markdown")
    return frozenset(native | {call.tool for message in turns for call in calls_of(message, tool_format)})


def _names(pattern: str, conversation: Conversation) -> bool:
    return any(fnmatchcase(own, pattern) for own in (conversation.name, conversation.group, conversation.id))


def _like(pattern: str, text: str) -> bool:
    """A pattern with * ? [ as a shell has it for the whole text, any other anywhere in it; upper and lower case are equal."""
    pattern, text = pattern.casefold(), text.casefold()
    return fnmatchcase(text, pattern) if any(sign in pattern for sign in "*?[") else pattern in text


def read_tags(path: Path) -> dict[str, Tag]:
    """A YAML file of `NAME: keep`, `NAME: drop` and `NAME: weight`.

    Raises:
        UserError: with the place and the value.
    """
    try:
        with open_regular(path.resolve()) as file:
            values = yaml.load(file.read(), Loader=yaml.BaseLoader)  # names such as 2026-01-01 stay text
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", hint=TAGS_HINT) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())[:200]}", hint=TAGS_HINT) from error
    if values is None or values == "":
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"{path}: not a list of names with their tags", hint=TAGS_HINT)
    return {name: _tag(value, f"{path}: {name}") for name, value in values.items()}


def _tag(value: Any, place: str) -> Tag:
    if value in (KEEP, DROP):
        return str(value)
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = -1.0
    if weight == 0 or LEAST_WEIGHT <= weight <= MOST_WEIGHT:
        return weight
    raise UserError(f"{place}: {value!r:.60} is not keep, drop or a weight from {LEAST_WEIGHT} to {MOST_WEIGHT}", hint=TAGS_HINT)
