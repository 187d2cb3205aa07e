"""What it learned from and how: learned tokens, data, settings, versions, and what to do with it now."""

from collections.abc import Iterator, Mapping, Sequence
from shlex import quote

from mlx_finetune.config import RunConfig, default
from mlx_finetune.prepared import COUNTS, SHARES
from mlx_finetune.report.files_of_run import Collected, Prepared, Split
from mlx_finetune.report.html import Cell, cells, commands, count, paragraph, section, table, text
from mlx_finetune.report.of_run import OfRun

PLACES = ("model", "data", "out")
COUNTED = ("learned_turns", "exact_turns", "served_as_trained", "placeholder_tokens", "turns_too_long")


def learned(of: OfRun, articles: Sequence[str], missing: str) -> str:
    """Examples as the engine is fed them; `missing`: why there are none."""
    if not articles:
        return section("learned", "What it learns, token by token", paragraph(text(missing), "missing"))
    told = (
        f"{count(len(articles), 'example')} of {len(of.dataset.train) if of.dataset else 0:,}, spread over the training data: "
        "<mark>learned</mark>, only read, <i>control token</i>. "
        f"More: <code>mlx-finetune inspect {text(quote(of.config.data))} --html FILE</code>"
    )
    return section("learned", "What it learns, token by token", f'<p class="faint key">{told}</p>\n', *articles)


def data(of: OfRun) -> str:
    """What was collected, kept and prepared."""
    if of.prepared is None:
        return section("data", "Data", paragraph(f"Not shown: {text(of.data_gone)}.", "missing"))
    tables = *_collected(of.collected), _sources(of.prepared), _exactness(of.prepared), *_left_out(of.prepared)
    return section("data", "Data", f'<div class="columns">{"".join(tables)}</div>\n', *_notes(of.prepared))


def _collected(found: Collected | None) -> Iterator[str]:
    if found is None:
        yield paragraph(
            "What <code>collect</code> found and rejected is not here: its folder is not beside the data, or has changed.", "faint"
        )
        return
    rows = [
        cells(source, found.found.get(source, 0), kept, found.found.get(source, 0) - kept, found.assistant_turns.get(source, 0))
        for source, kept in found.conversations.items()
    ]
    yield table("Collected conversations", ("source", "found", "kept", "rejected", "turns of the assistant"), rows)
    for title, first, counts in (
        ("Conversations rejected, by reason", "reason", found.rejected),
        ("Turns only read, by reason", "reason", found.context_only),
        ("Secrets replaced, by kind", "kind", found.secrets),
        ("Formats of tool calls", "format", found.formats),
    ):
        yield table(title, (first, "count"), [cells(name, number) for name, number in counts.items()])


def _splits(prepared: Prepared) -> dict[str, Split]:
    return {"training": prepared.train, "held out": prepared.valid} | ({"test": prepared.test} if prepared.test.examples else {})


def _sources(prepared: Prepared) -> str:
    rows = []
    for name, split in _splits(prepared).items():
        for source, conversations in split.conversations.items():
            rows.append(cells(f"{name}, {source}", conversations, split.learned_tokens_by_source.get(source, 0)))
    return table("Prepared conversations", ("split and source", "conversations", "learned tokens"), rows)


def _exactness(prepared: Prepared) -> str:
    splits = _splits(prepared)
    names = [name for name in COUNTED if name in SHARES or any(getattr(split, name) for split in splits.values())]
    rows = []
    for name in names:
        words = (SHARES[name][1] if name in SHARES else COUNTS[name]).strip()
        row = [Cell(text(words))]
        for split in splits.values():
            number = getattr(split, name)
            whole = getattr(split, SHARES[name][0]) if name in SHARES else 0
            share = f" <span class=faint>({_share(number, whole)})</span>" if whole else ""
            row.append(Cell(f"{number:,}{share}", number))
        rows.append(row)
    return table("Turns and exactness", ("turns", *splits), rows, sortable=False)


def _share(part: int, whole: int) -> str:
    return f"{1000 * part // whole / 10:g} %"  # rounded down: 100 % is all of it


def _left_out(prepared: Prepared) -> Iterator[str]:
    counted: dict[str, int] = {}
    for split in _splits(prepared).values():
        for kind, reasons in (("turn not learned", split.turns_refused), ("turn learned in another context", split.turns_inexact)):
            for reason, number in reasons.items():
                name = f"{kind}: {reason}"
                counted[name] = counted.get(name, 0) + number
    counted |= {f"conversation left out: {reason}": number for reason, number in prepared.left_out.items()}
    yield table("Left out, by reason", ("reason", "count"), [cells(name, number) for name, number in counted.items() if number])


def _notes(prepared: Prepared) -> Iterator[str]:
    policy = prepared.role_policy
    told = f"Roles {text(policy.name)}: {text(policy.what)}." + (f" {text(policy.why)}." if policy.why else "")
    yield paragraph(f"{told} Windows of {prepared.max_length:,} tokens at most.", "faint")
    for oddity in prepared.template_oddities:
        yield paragraph(f"Chat template: {text(oddity)}.", "faint")


def settings(of: OfRun) -> str:
    """Those that were set come first; the others are folded."""
    values = of.config.to_dict()
    told = {name: values[name] for name in values if name in PLACES or values[name] != default(name)}
    others = {name: value for name, value in values.items() if name not in told}
    defaults = _settings("Settings as by default", others)
    folded = f"<details><summary>{count(len(others), 'setting')} as by default</summary>{defaults}</details>"
    parts = [_settings("Settings that are not the default", told), folded]
    return section(
        "settings", "Settings and versions", '<div class="columns"><div>', *parts, "</div><div>", _versions(of), "</div></div>"
    )


def _settings(title: str, values: Mapping[str, object]) -> str:
    fields = RunConfig.model_fields
    rows = [
        [
            Cell(f"<code>{text(name)}</code>"),
            Cell(f"<b>{text(_plain(value))}</b><br><span class=faint>{text(fields[name].description)}</span>", kind="word"),
        ]
        for name, value in values.items()
    ]
    return table(title, ("setting", "value"), rows, sortable=False)


def _plain(value: object) -> str:
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _versions(of: OfRun) -> str:
    progress = of.progress
    rows = [cells(name, version) for name, version in progress.versions.items()]
    facts = {"engine": progress.engine or of.config.engine, "device": progress.device, "checkpoint": of.checkpoint}
    facts |= {"data, by content": progress.data, "base model, by content": progress.model}
    told = [cells(name, value) for name, value in facts.items() if value]
    return table("Computed by", ("what", "value"), told, sortable=False) + table(
        "Versions", ("package", "version"), rows, sortable=False
    )


def using(of: OfRun) -> str:
    """Commands."""
    if not of.checkpoint:
        return section("use", "Use it", paragraph("No checkpoint is saved yet.", "missing"))
    run = of.typed
    lines = ["# an OpenAI-compatible server on this machine; it prints how gptme is called", f"mlx-finetune serve {run}"]
    lines += ["# gptme as the conversations were had that it learned from", of.gptme] if of.gptme else []
    serve = commands(*lines)
    chat = commands("# or talk to it here, with /base and /tuned to compare", f"mlx-finetune chat {run}")
    back = commands(
        "# the adapter in the original weights: an ordinary Hugging Face folder",
        f"mlx-finetune fuse {run} --out MODEL",
        "# or in another tool's own format: peft, mlx-lm, gguf, ollama",
        f"mlx-finetune export {run} --to gguf --out DIR",
    )
    return section("use", "Use it", "<h3>Serve it for gptme</h3>", serve, chat, "<h3>Hand it back</h3>", back)
