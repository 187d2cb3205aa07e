"""What `collect` does, from its options to the lines that a person reads."""

import getpass
import os
import re
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mlx_finetune.collected import show_collection, show_examples, show_hits
from mlx_finetune.commands import load_template
from mlx_finetune.data.collect import collect
from mlx_finetune.data.conversation import LEAST_WEIGHT, MOST_WEIGHT
from mlx_finetune.data.found import Sources
from mlx_finetune.data.redact import Rules
from mlx_finetune.data.refine import Settings, without_secrets
from mlx_finetune.data.refining import FileSource
from mlx_finetune.data.scan import Hit, scan_file, scan_log
from mlx_finetune.data.select import Selection
from mlx_finetune.data.sources import BadLine
from mlx_finetune.data.sources.gptme import default_logs_folder, find_logs
from mlx_finetune.data.sources.openassistant import Options
from mlx_finetune.data.tags import read_tags
from mlx_finetune.data.turns import TurnRules
from mlx_finetune.errors import UserError
from mlx_finetune.nearest import did_you_mean
from mlx_finetune.road import Collect
from mlx_finetune.terminal import Done, finish, progress, say

CHOICES = {
    "--system": ("keep", "short", "none"),
    "--tool-calls": ("text", "native"),
    "--relevant": ("code", "any"),
    "--format": ("markdown", "tool", "xml"),
}
SHOWN = 5
DAYS = {"d": 1, "w": 7, "m": 30, "y": 365}


@dataclass(frozen=True)
class CollectOptions:
    """The options of the command line, as they were given."""

    logs: Path | None
    openassistant: list[str] | None
    chat: list[str] | None
    gptme: bool
    out: Path
    update: bool
    since: str
    until: str
    tool: list[str] | None
    formats: list[str] | None
    from_model: list[str] | None
    title: list[str] | None
    exclude: list[str] | None
    tags: Path | None
    near_duplicates: float | None
    near_duplicate_search: bool
    system: str
    tool_calls: str
    modernise: bool
    recovery_weight: float
    relevant: str
    language: list[str] | None
    min_quality: float
    filters: bool
    redact: bool
    personal: bool
    home: list[str] | None
    emails: bool
    allow: list[str] | None
    scan_only: bool
    model: str
    show: bool
    as_json: bool


def collect_command(options: CollectOptions) -> None:
    """`mlx-finetune collect`."""
    sources, settings = sources_of(options), settings_of(options)
    for source in filter(None, (sources.logs, *sources.openassistant, *sources.chats)):
        say(f"reading {source}")
    if options.scan_only:
        _scan(sources, settings.redaction or Rules(), options.as_json)
        return
    collected(options, sources, settings).finish(options.as_json)


def collected(options: CollectOptions, sources: Sources, settings: Settings) -> Done:
    """Reads the sources into `options.out`."""
    template = load_template(options.model) if options.model else None
    with progress("collect") as advance:
        result = collect(sources, settings, options.out, advance, options.update, template)
    if result["unchanged"]:
        say(f"nothing is new: {options.out} stays as it is")
    if changed := result.get("changed_options"):
        say(f"other options than before ({', '.join(changed)}): everything was read again")
    for name in result.get("unmatched", ())[:SHOWN]:
        say(f"--tags or --exclude: nothing is called {name!r:.80}")
    for reason, count in result.get("not_rendered", {}).items():
        say(f"{count:,} conversations are not in train.csv and train.jsonl: {reason}")
    if not options.near_duplicate_search:
        say("near-duplicates were not looked for: they may stand in training and validation both")
    if not options.redact:
        say("secrets were not removed: these files are as private as your logs")

    def show() -> None:
        show_collection(result)
        if options.show:
            show_examples(options.out, result)

    following = f"mlx-finetune prepare {options.out} --model MODEL"
    return Done(result | {"out": str(options.out)}, show, options.out, following)


def sources_of(options: CollectOptions) -> Sources:
    """What to read; raises UserError where that is nothing."""
    if not options.gptme and options.logs:
        raise UserError(f"{options.logs}: a logs folder with --no-gptme", hint="leave one of the two out")
    logs = options.logs or (default_logs_folder(os.environ, Path.home(), sys.platform) if options.gptme else None)
    if not logs and not options.openassistant and not options.chat:
        raise UserError("nothing to read", hint="leave out --no-gptme, or name --openassistant or --chat FILE")
    languages = tuple(options.language or Collect.default("language"))
    trees = Options(
        relevant=_choice("--relevant", options.relevant),
        languages=() if "any" in languages else languages,
        min_quality=_between("--min-quality", options.min_quality, 0, 1) if options.filters else 0.0,
        max_bad=Options().max_bad if options.filters else 1.0,
        identity=options.filters,
    )
    return Sources(logs, tuple(options.openassistant or ()), tuple(options.chat or ()), trees)


def settings_of(options: CollectOptions) -> Settings:
    """What becomes of a conversation; raises UserError for a value out of range."""
    selection = Selection(
        since=_moment("--since", options.since, end=False),
        until=_moment("--until", options.until, end=True),
        tools=tuple(options.tool or ()),
        formats=tuple(_choice("--format", one) for one in options.formats or ()),
        models=tuple(options.from_model or ()),
        titles=tuple(options.title or ()),
        exclude=tuple(options.exclude or ()),
        tags=read_tags(options.tags) if options.tags else {},
    )
    weight = _between("--recovery-weight", options.recovery_weight, LEAST_WEIGHT, MOST_WEIGHT)
    return Settings(
        selection=selection,
        redaction=_redaction(options),
        turns=TurnRules(options.modernise, weight),
        system=_choice("--system", options.system),
        tool_calls=_choice("--tool-calls", options.tool_calls),
        near_duplicates=_near_duplicates(options),
    )


def _near_duplicates(options: CollectOptions) -> float | None:
    """At which similarity one is dropped; None where none is looked for."""
    if options.near_duplicate_search:
        given = options.near_duplicates
        return Settings().near_duplicates if given is None else _between("--near-duplicates", given, 0, 1)
    if options.near_duplicates is not None:
        hint = "leave one of the two out; --near-duplicates 0 looks for them and keeps them all, in one split"
        raise UserError(f"--near-duplicates {options.near_duplicates:g} with --no-near-duplicate-search", hint=hint)
    return None


def _redaction(options: CollectOptions) -> Rules | None:
    """What is replaced; raises UserError where one option says nothing because of another."""
    needs = {"--no-redact": ("--home", "--emails", "--allow"), "--no-personal": ("--home",)}
    given = {"--home": options.home, "--emails": options.emails, "--allow": options.allow}
    for off, on in (("--no-redact", options.redact), ("--no-personal", options.personal)):
        if not on and (idle := [name for name in needs[off] if given[name]]):
            raise UserError(f"{idle[0]} with {off} replaces nothing", hint=f"leave out {off} or {idle[0]}")
    if not options.redact:
        return None
    person = (Path.home(), getpass.getuser()) if options.personal else (Path("/"), "")
    return Rules.for_person(
        *person, tuple(options.home or ()), emails=options.emails, allow=tuple(options.allow or ()), personal=options.personal
    )


def _scan(sources: Sources, rules: Rules, as_json: bool) -> None:
    """Says where secrets stand, and writes nothing."""
    logs, skipped = find_logs(sources.logs) if sources.logs else ([], [])
    files = [FileSource(name, "openassistant", sources.openassistant_options) for name in sources.openassistant]
    files += [FileSource(name, "chat") for name in sources.chats]
    found: list[Hit | BadLine] = []
    with progress("scan") as advance:
        for done, log in enumerate(logs, 1):
            found += scan_log(log, rules)
            advance(done, len(logs) + len(files))
        for done, file in enumerate(files, len(logs) + 1):
            found += scan_file(file, rules)
            advance(done, len(logs) + len(files))
    hits = [one for one in found if isinstance(one, Hit)]
    unread = [BadLine(Path(one.id), 0, one.reason) for one in skipped] + [one for one in found if isinstance(one, BadLine)]
    unread = [replace(one, reason=without_secrets(one.reason, rules)) for one in unread]
    result: dict[str, Any] = {"secrets": [hit.to_json() for hit in hits], "not_read": [one.to_json() for one in unread]}
    finish(result, as_json, lambda: show_hits(hits, unread), None, "mlx-finetune collect   (it replaces them by placeholders)")


def _choice(option: str, value: str) -> Any:
    if value not in CHOICES[option]:
        raise UserError(
            f"{option} {value!r} is not one of {', '.join(CHOICES[option])}",
            hint=did_you_mean(value, CHOICES[option], f"{option} {CHOICES[option][0]}"),
        )
    return value


def _between(option: str, value: float, least: float, most: float) -> float:
    if not least <= value <= most:
        raise UserError(f"{option} {value} is not from {least} to {most}", hint="mlx-finetune collect --help")
    return value


def _moment(option: str, text: str, end: bool) -> str:
    """A day, a moment or an age as ISO 8601 in UTC; a day is the whole day, in local time."""
    if not text:
        return ""
    if age := re.fullmatch(r"(\d{1,4})([dwmy])", text):
        today = datetime.now().astimezone().replace(hour=0, minute=0, second=0, microsecond=0)  # the same all day long
        moment = (today - timedelta(days=int(age[1]) * DAYS[age[2]])).astimezone(UTC)
    else:
        try:
            moment = datetime.fromisoformat(text)
            if end and len(text) <= len("2026-01-01"):
                moment += timedelta(days=1)
            moment = moment.astimezone(UTC)
        except (ValueError, OverflowError, OSError) as error:
            raise UserError(f"{option} {text!r}: no such time", hint="write 2026-06-01, 2026-06-01T12:00 or 30d") from error
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
