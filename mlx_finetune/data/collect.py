"""Sources in, one folder out, in constant memory: what was kept a file a source, and what was not with its reason.

Each conversation is read once, refined, and its text put aside on the disk; once all are read, duplicates are decided on from
small fingerprints, and the rest is written. A later run reads only what is new.
"""

import json
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.data.collection import (
    INDEX,
    TAGS,
    VERSION,
    Bodies,
    Earlier,
    Kept,
    Place,
    Unit,
    digest_of,
    file_stamps,
    key_of,
    read_index,
    write_index,
)
from mlx_finetune.data.conversation import Conversation, conversation_of, read_conversations
from mlx_finetune.data.dedupe import Decision, decide
from mlx_finetune.data.fingerprint import shingles_of
from mlx_finetune.data.found import Sources, find
from mlx_finetune.data.refine import Settings, without_secrets
from mlx_finetune.data.refining import Advance, FileSource, Work, number_secrets, refine_file, refine_logs
from mlx_finetune.data.rendered import write_rendered
from mlx_finetune.data.select import ID, Selection
from mlx_finetune.data.sources import Rejected
from mlx_finetune.data.sources import gptme as gptme_source
from mlx_finetune.data.summary import hint_for, summarise
from mlx_finetune.data.tags import Line, any_meant, tag_lines
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_file, atomic_folder, sync, write_json

SPOOL = ".spool"
NAMED_REASONS = 5


def _nothing(done: int, total: int, note: str = "") -> None:
    """No progress is shown."""


def collect(
    sources: Sources,
    settings: Settings,
    out: Path,
    advance: Advance = _nothing,
    update: bool = False,
    template: ChatTemplate | None = None,
) -> dict[str, Any]:
    """Reads the sources into the new folder `out`; gives back its collect.json, and "unchanged" and "changed_options".

    It holds `gptme.jsonl`, `openassistant.jsonl` and `chat.jsonl` (each only where that source was read), `rejected.jsonl`,
    `tags.yaml` for a person to edit, and `collect.json`; with `template` also `train.csv` and `train.jsonl`. Where `out` is
    such a folder of the same sources and settings, nothing is done if nothing is new; with `update` what is new is read
    (everything, where settings differ) and the folder replaced by one that holds all of it.

    Raises:
        UserError: `out` exists and is something else, a source cannot be read, there is no source, or no conversation is left.
    """
    found = find(sources, settings, out, template)
    logs, skipped, files, asked, state, earlier = found.logs, found.skipped, found.files, found.asked, found.state, found.earlier
    if earlier and found.unchanged:
        return {**earlier.summary, "unchanged": True, "changed_options": []}
    if earlier and not update:
        _refuse_without_update(out, earlier)
    known = {unit.key: unit for unit in read_index(out)} if earlier and not set(earlier.changed) - {"rendered_with"} else {}
    with atomic_folder(out, replace_old=bool(earlier), private=True) as folder, ThreadPoolExecutor(1) as disk:
        (folder / SPOOL).mkdir()
        reader = _Reader(Work(settings, secrets.token_bytes(32), str(folder / SPOOL)), known)
        skipped = [replace(one, id=without_secrets(one.id, settings.redaction)) for one in skipped]
        units = [Unit("", "", (), tuple(skipped))] if skipped else []
        units += list(reader.read(logs, files, advance))
        written = _write(folder, units, settings, reader.placeholders)
        on_disk = [disk.submit(sync, folder / f"{source}.jsonl") for source in {kept.source for kept in written.everything}]
        summary = summarise(units, written.decision, written.everything, reader.distinct)
        summary |= asked | {"version": VERSION, "state": state}
        if not written.places:
            _refuse_nothing_left(summary)
        if template:
            kept = (folder / f"{source}.jsonl" for source in summary["conversations"])
            refused = write_rendered((one for path in kept for one in read_conversations(path)), template, folder)
            summary["not_rendered"] = dict(refused.most_common())
        _finish(folder, units, written, summary, settings.selection)
        for done in on_disk:
            done.result()
    return summary | {"unchanged": False, "changed_options": list(earlier.changed) if earlier else []}


def _refuse_without_update(out: Path, earlier: Earlier) -> None:
    if earlier.changed:
        hint = "--update collects everything anew with these options; or choose another --out"
        raise UserError(f"{out} exists already, collected with another {earlier.changed[0].replace('_', ' ')}", hint=hint)
    raise UserError(f"{out} exists already, and there is something new to collect", hint="--update adds what is new to it")


class _Reader:
    """Refines what is new, takes over what is known, and numbers the secrets."""

    def __init__(self, work: Work, known: Mapping[str, Unit]) -> None:
        self._work, self._known = work, known
        self.placeholders: dict[bytes, str] = {}  # by the digest of the secret
        self.distinct: Counter[str] = Counter()  # secrets by kind

    def read(self, logs: Sequence[gptme_source.Log], files: Sequence[FileSource], advance: Advance) -> Iterator[Unit]:
        """Every unit in order; `advance` is told of bytes."""
        total = sum(log.size for log in logs) + sum(one.size for one in files)
        done = 0
        refined = refine_logs([log for log in logs if not self._earlier(log.name, log.stamp)], self._work)
        for log in logs:
            yield self._earlier(log.name, log.stamp) or self._numbered(next(refined))
            done += log.size
            advance(done, total)
        for one in files:
            advance(done, total, one.name)
            yield self._earlier(one.name, one.stamp) or self._numbered(refine_file(one, self._work))
            done += one.size
            advance(done, total)

    def _earlier(self, name: str, stamp: str) -> Unit | None:
        """What came of it in an earlier run, if it is as it was."""
        unit = self._known.get(key_of(name)) if self._known and stamp else None
        return unit if unit and unit.stamp == stamp else None

    def _numbered(self, unit: Unit) -> Unit:
        """Each secret that is new has the next number of its kind."""
        for kind, digest in (secret for kept in unit.kept for secret in kept.secrets):
            if digest not in self.placeholders:
                self.distinct[kind] += 1
                self.placeholders[digest] = f"[REDACTED:{kind}:{self.distinct[kind]}]"
        return replace(unit, kept=tuple(self._slim(kept) for kept in unit.kept))

    def _slim(self, kept: Kept) -> Kept:
        """With its secrets numbered in all but its text, and the names of its counts shared with all others in memory."""
        counts = Counter({sys.intern(name): count for name, count in kept.counts.items()})
        place = (sys.intern(kept.place[0]), *kept.place[1:])
        if not kept.secrets:
            return replace(kept, counts=counts, place=place)
        name, head, group = (
            number_secrets(text, kept.secrets, self.placeholders) for text in (kept.name, kept.head, kept.print.group)
        )
        return replace(kept, name=name, head=head, print=replace(kept.print, name=name, group=group), counts=counts, place=place)


@dataclass(frozen=True)
class _Written:
    """`places`: of the conversations in `everything`, by index, where they stand now; changed ones only in `changed`."""

    everything: Sequence[Kept]
    decision: Decision
    places: Mapping[int, Place]
    changed: frozenset[int]


def _write(folder: Path, units: Sequence[Unit], settings: Settings, placeholders: Mapping[bytes, str]) -> _Written:
    """The files of conversations, once duplicates are decided on."""
    everything = [kept for unit in units for kept in unit.kept]
    bodies = Bodies()
    decision = decide([kept.print for kept in everything], lambda i: _shingles(everything[i], bodies), settings.near_duplicates)
    places: dict[int, Place] = {}
    for source in sorted({kept.source for kept in everything}):
        path, end = folder / f"{source}.jsonl", 0
        with path.open("wb") as file:
            for i, kept in enumerate(everything):
                if kept.source != source or i in decision.dropped:
                    continue
                body = bodies.read(kept.place)
                if kept.secrets:
                    body = number_secrets(body.decode(), kept.secrets, placeholders).encode()
                if i in decision.context:
                    body = _as_context(body, decision.context[i])
                start = _in_group(kept, decision.groups[i])[:-1].encode() + b", "
                file.write(start + body + b"\n")
                places[i] = (str(path), end + len(start), len(body))
                end += len(start) + len(body) + 1
    bodies.close()
    return _Written(everything, decision, places, frozenset(decision.context))


def _in_group(kept: Kept, group: str) -> str:
    """The first half of its line, with its cluster as the group."""
    return kept.head if group == kept.print.group else json.dumps(json.loads(kept.head) | {"group": group}, ensure_ascii=False)


def _shingles(kept: Kept, bodies: Bodies) -> np.ndarray:
    return shingles_of(_conversation(kept, bodies.read(kept.place)))


def _conversation(kept: Kept, body: bytes) -> Conversation:
    return conversation_of(json.loads(kept.head) | json.loads(b"{" + body), kept.name)


def _as_context(body: bytes, turns: Iterable[int]) -> bytes:
    """The same messages; those turns are learned in another conversation."""
    row = json.loads(b"{" + body)
    for turn in turns:
        row["messages"][turn] |= {"weight": 0.0, "reason": "learned in another conversation"}
    return json.dumps(row, ensure_ascii=False)[1:].encode()


def _finish(folder: Path, units: Sequence[Unit], written: _Written, summary: dict[str, Any], chosen: Selection) -> None:
    rejected = [one for unit in units for one in unit.rejected]
    rejected += [
        Rejected(written.everything[i].name, written.everything[i].source, why)
        for i, why in sorted(written.decision.dropped.items())
    ]
    with atomic_file(folder / "rejected.jsonl") as file:
        rows = ({"id": one.id, "source": one.source, "reason": one.reason} for one in rejected)
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with atomic_file(folder / TAGS) as file:
        file.writelines(tag_lines(_tagged(written, rejected), chosen.tags))
    summary["tags"] = digest_of(folder / TAGS)
    summary["unmatched"] = _unmatched(written, rejected, chosen)
    unchanged = {id(written.everything[i]): place for i, place in written.places.items() if i not in written.changed}
    write_index(folder / INDEX, units, unchanged)
    shutil.rmtree(folder / SPOOL)
    names = [path.name for path in folder.iterdir() if path.suffix == ".jsonl" or path.name == INDEX]
    summary["files"] = file_stamps(folder, sorted(names))
    write_json(folder / "collect.json", summary)


def _unmatched(written: _Written, rejected: Iterable[Rejected], chosen: Selection) -> list[str]:
    """What the tags and --exclude name that nothing is called; an id of what was left out cannot be known."""
    asked = [name for name in (*chosen.tags, *chosen.exclude) if not ID.fullmatch(name)]
    if not asked:
        return []
    names = {name for line in _tagged(written, ()) for name in line.names} | {one.id for one in rejected}
    return [name for name in asked if name not in names and not any_meant(name, names)]


def _tagged(written: _Written, rejected: Iterable[Rejected]) -> Iterator[Line]:
    for i in written.places:
        kept = written.everything[i]
        head = json.loads(kept.head)
        turns = kept.counts["turns"]
        note = f"{head['meta'].get('title') or ''} ({turns} turn{'s' if turns != 1 else ''})".lstrip()
        yield Line((kept.name, head["id"], kept.print.group), note)
    yield from (Line((one.id,), "", one.reason) for one in rejected if one.by_tag)


def _refuse_nothing_left(summary: Mapping[str, Any]) -> None:
    counts = [f"{reason} ({count})" for reason, count in summary["rejected"].items()]
    if (more := len(counts) - NAMED_REASONS) > 1:
        counts[NAMED_REASONS:] = [f"and {more} other reasons"]
    if summary["bad_lines"]:
        first = summary["bad_lines"][0]
        counts.append(f"{summary['bad_line_count']} unreadable lines, the first {first['file']}:{first['line']}: {first['reason']}")
    raise UserError(
        f"no conversation left after cleaning: {'; '.join(counts)}",
        hint=hint_for(next(iter(summary["rejected"]), "")),
    )
