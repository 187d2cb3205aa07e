"""Sources in, one folder out: what was kept a file a source, and what was not with its reason."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_finetune.data.clean import reason_to_reject
from mlx_finetune.data.conversation import Conversation, write_conversations
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.sources import BadLine, Read, Rejected
from mlx_finetune.data.sources import gptme as gptme_source
from mlx_finetune.data.sources import openassistant as openassistant_source
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_file, atomic_folder, refuse_existing, write_json


@dataclass(frozen=True)
class Summary:
    """What collect.json says: counts by source, rejections by reason, and the lines that were passed over."""

    conversations: dict[str, int]
    assistant_turns: dict[str, int]
    rejected: dict[str, int]
    bad_lines: tuple[BadLine, ...]
    blank_lines: int

    def to_json(self) -> dict[str, Any]:
        """As it stands in collect.json."""
        return {
            "conversations": self.conversations,
            "assistant_turns": self.assistant_turns,
            "rejected": self.rejected,
            "bad_lines": [bad_line.to_json() for bad_line in self.bad_lines],
            "blank_lines": self.blank_lines,
        }


def collect(logs: Path | None, openassistant: Sequence[Path], out: Path, template: ChatTemplate | None = None) -> Summary:
    """Reads a folder of gptme logs and any number of OpenAssistant files into the new folder `out`.

    It holds `gptme.jsonl` and `openassistant.jsonl` (each only where that source was read), `rejected.jsonl` and
    `collect.json`; with `template` also `train.csv` and `train.jsonl`. Of equal conversations the first is kept.

    Raises:
        UserError: `out` exists, a source cannot be read, there is no source, or no conversation is left.
    """
    refuse_existing(out)
    reads = _read_sources(logs, openassistant)
    kept, rejected = _clean(reads)
    summary = _summary(reads, kept, rejected)
    if not any(kept.values()):
        _refuse_nothing_left(summary)
    with atomic_folder(out) as folder:
        for source, conversations in kept.items():
            write_conversations(folder / f"{source}.jsonl", conversations)
        with atomic_file(folder / "rejected.jsonl") as file:
            file.writelines(json.dumps(one.to_json(), ensure_ascii=False) + "\n" for one in rejected)
        write_json(folder / "collect.json", summary.to_json())
        if template:
            write_rendered((c for conversations in kept.values() for c in conversations), template, folder)
    return summary


def write_rendered(conversations: Iterable[Conversation], template: ChatTemplate, folder: Path) -> None:
    """train.csv (one column, `text`) and train.jsonl ({"text": ...}), as gptme's first collector wrote them.

    Raises:
        UserError: the template does not take a conversation; `prepare` says which turns can be learned.
    """
    with ExitStack() as files:
        lines = files.enter_context(atomic_file(folder / "train.jsonl"))
        table = csv.writer(files.enter_context(atomic_file(folder / "train.csv")), lineterminator="\n", quoting=csv.QUOTE_ALL)
        table.writerow(["text"])
        for conversation in conversations:
            try:
                text = template.render(template.as_learned(conversation.messages))
            except Refused as refused:
                raise UserError(f"{conversation.group}: {refused}", hint="collect without --model") from refused
            table.writerow([text])
            lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def _read_sources(logs: Path | None, openassistant: Sequence[Path]) -> dict[str, list[Read]]:
    reads: dict[str, list[Read]] = {}
    if logs is not None:
        reads[gptme_source.SOURCE] = [gptme_source.read(logs)]
    if openassistant:
        reads[openassistant_source.SOURCE] = [openassistant_source.read(path) for path in openassistant]
    if not reads:
        raise UserError("nothing to collect: no source was named", hint="name a logs folder or an OpenAssistant file")
    return reads


def _clean(reads: Mapping[str, Sequence[Read]]) -> tuple[dict[str, list[Conversation]], list[Rejected]]:
    kept: dict[str, list[Conversation]] = {source: [] for source in reads}
    rejected = [one for read in _each(reads) for one in read.rejected]
    seen: set[str] = set()
    for conversation in (one for read in _each(reads) for one in read.conversations):
        reason = reason_to_reject(conversation)
        if reason is None and conversation.id in seen:
            reason = f"duplicate of {conversation.id}"
        if reason is None:
            seen.add(conversation.id)
            kept[conversation.source].append(conversation)
        else:
            rejected.append(Rejected(conversation.group, conversation.source, reason))
    return kept, rejected


def _summary(
    reads: Mapping[str, Sequence[Read]], kept: Mapping[str, Sequence[Conversation]], rejected: Sequence[Rejected]
) -> Summary:
    reasons = Counter("duplicate" if one.reason.startswith("duplicate of ") else one.reason for one in rejected)
    return Summary(
        conversations={source: len(conversations) for source, conversations in kept.items()},
        assistant_turns={source: sum(one.assistant_turns for one in kept[source]) for source in kept},
        rejected=dict(reasons.most_common()),
        bad_lines=tuple(bad_line for read in _each(reads) for bad_line in read.bad_lines),
        blank_lines=sum(read.blank_lines for read in _each(reads)),
    )


def _each(reads: Mapping[str, Sequence[Read]]) -> Iterator[Read]:
    return (read for of_source in reads.values() for read in of_source)


def _refuse_nothing_left(summary: Summary) -> None:
    counts = [f"{reason} ({count})" for reason, count in summary.rejected.items()]
    if summary.bad_lines:
        first = summary.bad_lines[0]
        counts.append(f"{len(summary.bad_lines)} unreadable lines, the first {first.path}:{first.line}: {first.reason}")
    raise UserError(
        f"no conversation left after cleaning: {'; '.join(counts)}",
        hint="name another logs folder, or add --openassistant FILE: each needs a user turn and an assistant turn",
    )
