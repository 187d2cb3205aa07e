"""What `collect` is asked to read, what of it there is, and whether anything of it is new."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_finetune.data.collection import Earlier, earlier_collection, stamps_digest
from mlx_finetune.data.redact import Rules
from mlx_finetune.data.refine import Settings, without_secrets
from mlx_finetune.data.refining import FileSource
from mlx_finetune.data.sources import Rejected
from mlx_finetune.data.sources import gptme as gptme_source
from mlx_finetune.data.sources.openassistant import Options
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError


@dataclass(frozen=True)
class Sources:
    """Where conversations come from: a folder of gptme logs, OpenAssistant and chat files (paths or hub ids)."""

    logs: Path | None = None
    openassistant: tuple[str, ...] = ()
    chats: tuple[str, ...] = ()
    openassistant_options: Options = field(default_factory=Options)

    def to_json(self, redaction: Rules | None) -> dict[str, Any]:
        """As it stands in collect.json: absolute paths, which do not say who the person is, and hub ids."""

        def place(name: str) -> str:
            return without_secrets(os.path.abspath(name) if os.path.lexists(name) else name, redaction)  # noqa: PTH100

        return {
            "logs": place(str(self.logs)) if self.logs else None,
            "openassistant": [place(name) for name in self.openassistant],
            "openassistant_options": self.openassistant_options.to_json(),
            "chats": [place(name) for name in self.chats],
        }


@dataclass(frozen=True)
class Found:
    """What there is to read, and what an earlier run made of it. `state`: tells one state of the sources from another."""

    logs: Sequence[gptme_source.Log]
    skipped: Sequence[Rejected]
    files: Sequence[FileSource]
    asked: dict[str, Any]
    state: str
    earlier: Earlier | None

    @property
    def unchanged(self) -> bool:
        """Whether there is nothing to do; where a source is on the Hub that cannot be known."""
        known = all(one.stamp for one in self.files)
        return bool(known and self.earlier and not self.earlier.changed and self.earlier.summary["state"] == self.state)


def find(sources: Sources, settings: Settings, out: Path, template: ChatTemplate | None) -> Found:
    """Looks at names, sizes and times.

    Raises:
        UserError: there is no source, or `out` is something else than what `collect` makes of them.
    """
    logs, skipped = gptme_source.find_logs(sources.logs) if sources.logs else ([], [])
    files = [FileSource(name, "openassistant", sources.openassistant_options) for name in sources.openassistant]
    files += [FileSource(name, "chat") for name in sources.chats]
    if not sources.logs and not files:
        raise UserError("nothing to collect: no source was named", hint="name a logs folder, or --openassistant or --chat FILE")
    settings_asked = settings.to_json() | {"rendered_with": template.fingerprint if template else None}
    asked = json.loads(json.dumps({"sources": sources.to_json(settings.redaction), "settings": settings_asked}))
    state = stamps_digest([*((log.name, log.stamp) for log in logs), *((Path(one.name).name, one.stamp) for one in files)])
    return Found(logs, skipped, files, asked, state, earlier_collection(out, asked))


def what_is_new(sources: Sources, settings: Settings, out: Path) -> str | None:
    """What `collect` with `update` would take up, in words; None where nothing is new. Reads no conversation.

    Raises:
        UserError: see `collect`.
    """
    found = find(sources, settings, out, None)
    if found.unchanged:
        return None
    if found.earlier is None:
        return "not collected yet"
    if found.earlier.changed:
        return f"other settings: {', '.join(found.earlier.changed)}"
    is_new = found.earlier.summary["state"] != found.state
    return "new or changed conversations" if is_new else "a source on the Hub is looked at again"
