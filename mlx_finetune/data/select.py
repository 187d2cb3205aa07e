"""What a person chooses to learn from: by time, tool, format, model, title, and by a file of tags."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from mlx_finetune.data.conversation import Conversation
from mlx_finetune.data.sources import Rejected
from mlx_finetune.data.tags import DROP, KEEP, Tag, is_meant, tag_of
from mlx_finetune.data.turns import calls_of

ID = re.compile(r"[0-9a-f]{8,16}\**")  # of a conversation, or its beginning and a star
DROPPED = "not selected: dropped by the tags file"


@dataclass(frozen=True)
class Selection:
    """All that was asked for; an empty field asks for nothing. Times are ISO 8601 in UTC, patterns those of a shell.

    Times, tools, formats, models and titles choose among a person's own conversations (gptme logs and chat files), not among
    OpenAssistant's; `exclude` and `tags` are names, ids or patterns of them and mean every source. A tag `keep` takes what the
    other choices (but not `exclude`) would leave; a weight only says how much what they take counts.
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

    @property
    def names_ids(self) -> bool:
        """Whether something may be an id."""
        return any(ID.fullmatch(name) for name in (*self.exclude, *self.tags))

    def tag(self, conversation: Conversation, also: Sequence[str] = ()) -> Tag | None:
        """What the tags file says of it (see `tag_of`); `also` are its name and id as they were written, without secrets."""
        return tag_of((*names_of(conversation), *also), self.tags) if self.tags else None

    def leaves(self, conversation: Conversation, also: Sequence[str] = ()) -> Rejected | None:
        """What was not asked for, with the reason; None where it was. `also` as in `tag`."""
        tag = self.tag(conversation, also)
        rejected = Rejected(conversation.name, conversation.source, DROPPED, by_tag=True)
        if tag in (DROP, 0):
            return rejected
        if self.exclude and any(is_meant(pattern, (*names_of(conversation), *also)) for pattern in self.exclude):
            return replace(rejected, reason="not selected: --exclude", by_tag=False)
        reason = None if tag == KEEP else self._reason_not_asked_for(conversation)
        return replace(rejected, reason=reason) if reason else None

    def _reason_not_asked_for(self, conversation: Conversation) -> str | None:
        if conversation.source == "openassistant":
            return None
        meta = conversation.meta
        time = str(meta.get("time") or "")
        if (self.since and time < self.since) or (self.until and not "" < time < self.until):
            return "not selected: outside --since and --until"
        if self.formats and meta.get("tool_format") not in self.formats:
            return "not selected: another --format"
        if self.models and not any(map(self._is_wanted, _models_of(conversation) or [meta.get("model")])):
            return "not selected: another --from-model"
        if self.titles and not any(_like(p, str(meta.get("title") or "")) or _like(p, conversation.name) for p in self.titles):
            return "not selected: another --title"
        if self.tools and not tools_used(conversation) & set(self.tools):
            return "not selected: no call of --tool"
        return None

    def of_wanted_models(self, conversation: Conversation, tag: Tag | None) -> Conversation:
        """Where the turns are of several models, those of another than was asked for become context only.

        meta["turn_models"], the model of each assistant turn in turn, is gone from the result.
        """
        if not _models_of(conversation):
            return conversation
        models = iter(_models_of(conversation))
        messages = list(conversation.messages)
        for i, message in enumerate(messages):
            if message.role == "assistant" and not self._is_wanted(next(models)) and self.models and tag != KEEP:
                messages[i] = replace(message, weight=0.0, reason=message.reason if message.weight == 0 else "of another model")
        meta = {key: value for key, value in conversation.meta.items() if key != "turn_models"}
        return replace(conversation, messages=tuple(messages), meta=meta)

    def _is_wanted(self, model: Any) -> bool:
        return any(_like(pattern, str(model or "")) for pattern in self.models)


def _models_of(conversation: Conversation) -> Sequence[str | None]:
    """Those of its assistant turns in turn, where a log tells and they are not all that of the conversation."""
    return conversation.meta.get("turn_models", ()) if conversation.source == "gptme" else ()


def tools_used(conversation: Conversation) -> frozenset[str]:
    """Names of the tools that its assistant turns call."""
    turns = [message for message in conversation.messages if message.role == "assistant"]
    native = {call.name for message in turns for call in message.tool_calls}
    tool_format = str(conversation.meta.get("tool_format") or "markdown")
    return frozenset(native | {call.tool for message in turns for call in calls_of(message, tool_format)})


def names_of(conversation: Conversation) -> tuple[str, str]:
    """What options and tags may call it: its own name, and the log or tree that it came from."""
    return conversation.name, conversation.group


def _like(pattern: str, text: str) -> bool:
    """A pattern with * ? [ as a shell has it for the whole text, any other anywhere in it; upper and lower case are equal."""
    pattern, text = pattern.casefold(), text.casefold()
    return fnmatchcase(text, pattern) if any(sign in pattern for sign in "*?[") else pattern in text
