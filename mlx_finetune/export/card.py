"""README.md of what is handed back: a model card by the Hub's specification (huggingface.co/docs/hub/model-cards).

The base's own card stays below ours. Nothing of a conversation, and no path, goes into it.
"""

import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal

import yaml

from mlx_finetune.export.facts import LICENSES, Compared, Facts, HeldOut
from mlx_finetune.files import atomic_file
from mlx_finetune.reading import LARGEST_SETTINGS, plain_yaml

Kind = Literal["model", "adapter", "gguf", "gguf adapter"]

FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
LIBRARY: Mapping[Kind, str] = {"model": "transformers", "adapter": "peft", "gguf": "gguf", "gguf adapter": "gguf"}
RELATION: Mapping[Kind, str] = {"model": "finetune", "adapter": "adapter", "gguf": "finetune", "gguf adapter": "adapter"}
WHAT: Mapping[Kind, str] = {
    "model": "fine-tuned",
    "adapter": "with an adapter, to be loaded beside it,",
    "gguf": "fine-tuned, as GGUF,",
    "gguf adapter": "with an adapter as GGUF, to be loaded beside a GGUF of it,",
}
MADE_FROM = {
    "checkpoint": "checkpoint",
    "sha256": "checkpoint, SHA-256 of its manifest",
    "data": "prepared data, by content",
    "model": "base model, by content",
    "adapter": "adapter that it began with, by content",
}
CARRIED = ("license", "license_name", "license_link", "language")  # of the base's card
SHARE_ALIKE = re.compile(r"cc-by(?:-nc)?-sa|a?gpl|lgpl|odbl|osl|mpl|eupl|cecill", re.IGNORECASE)
PUBLIC_DATA = {"openassistant": "[OpenAssistant](https://huggingface.co/OpenAssistant)"}
SOURCE_NAMES = {"gptme": "gptme conversations", "openassistant": "OpenAssistant", "chat": "chat files"}
MOST = 1 << 20  # characters of the base's card that are kept


def write_card(folder: Path, facts: Facts, report: Mapping[str, Any], kind: Kind = "model") -> None:
    """Writes README.md into `folder`, over a copy of the base's; `report`: what verification.json says."""
    with atomic_file(folder / "README.md") as file:
        file.write(card(facts, report, kind))


def card(facts: Facts, report: Mapping[str, Any], kind: Kind = "model") -> str:
    """The text of the card; `kind`: a whole model, an adapter, or a GGUF file."""
    of_base, below = split_card(facts.base_card)
    formats = {*report["verified"].get("readers", ()), *report["verified"].get("not_asked", ())}  # of an adapter
    sections = [_about(facts, kind), _data(facts), _method(facts), _results(facts), _serving(facts, kind, formats)]
    sections += [_verification(report["verified"], kind), _licence(facts, of_base), _made_from(report.get("made_from", {}))]
    sections.append(_versions(facts, report["versions"]))
    text = front_matter(facts, of_base, kind, formats) + "\n" + "\n\n".join(filter(None, sections)) + "\n"
    return text + (
        f"\n---\n\nThe card of the base model, {_code(facts.base)}:\n\n{below[:MOST].strip()}\n" if below.strip() else ""
    )


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """The settings of a card's front matter, none where it has no readable one, and what stands below."""
    found = FRONT.match(text)
    if not found:
        return {}, text
    try:
        values = plain_yaml(found[1][:LARGEST_SETTINGS])
    except ValueError:
        values = None
    return (values if isinstance(values, dict) else {}), text[found.end() :]


def front_matter(facts: Facts, of_base: Mapping[str, Any], kind: Kind, formats: Set[str]) -> str:
    """YAML between two lines of dashes; base_model only where the base has an id on the Hub."""
    lora = [] if facts.method.get("fine_tune_type") == "full" else [str(facts.method.get("fine_tune_type", "lora"))]
    values: dict[str, Any] = {"base_model": facts.base, "base_model_relation": RELATION[kind]} if facts.on_hub else {}
    values |= {"library_name": "mlx" if formats == {"mlx-lm"} else LIBRARY[kind], "pipeline_tag": "text-generation"}
    values |= {key: of_base[key] for key in CARRIED if _is_plain(of_base.get(key))}
    values["tags"] = ["mlx-finetune", "gptme", *lora]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n"


def _is_plain(value: Any) -> bool:
    """Text, or a list of it: what the Hub takes here."""
    return (isinstance(value, str) and bool(value)) or (
        isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)
    )


def _about(facts: Facts, kind: Kind) -> str:
    base = f"[{facts.base}](https://huggingface.co/{facts.base})" if facts.on_hub else _code(facts.base)
    return f"# {_plain(facts.base.rpartition('/')[2])}, tuned on gptme conversations\n\n{base} {WHAT[kind]} by mlx-finetune."


def _data(facts: Facts) -> str:
    if not facts.sources:
        return "## Data\n\nNot known any more: the prepared data was not there when this card was written."
    rows = [(_source(s), f"{n:,}", f"{t:,}", LICENSES.get(s, "not stated")) for s, (n, t) in sorted(facts.sources.items())]
    table = _table(("source", "conversations", "learned tokens", "licence"), rows)
    counts = ", ".join(f"{count:,} {key.replace('_', ' ')}" for key, count in facts.counts.items())
    policy = f"\n\nRoles: {_plain(facts.role_policy)}." if facts.role_policy else ""
    return f"## Data\n\n{table}\n\nFor training: {counts}.{policy}"


def _source(name: str) -> str:
    return PUBLIC_DATA.get(name) or SOURCE_NAMES.get(name, "other")


def _method(facts: Facts) -> str:
    rows = [(name.replace("_", " "), _code(str(value))) for name, value in facts.method.items()]
    rows += [("target modules", _code(", ".join(facts.targets)))] if facts.targets else []
    rows += [("optimizer steps", _code(str(facts.step))), ("engine", _code(facts.engine))]
    return f"## Method\n\n{_table(('setting', 'value'), rows)}"


def _results(facts: Facts) -> str:
    found = facts.held_out
    if found is None:
        return "## Results\n\nHeld-out loss: not measured."
    if found.compared:
        return _with_intervals(found)
    rows = [("**the loss**", f"{found.base:.4f}", f"{found.tuned:.4f}")]
    rows += [(_source(s), f"{base:.4f}", f"{tuned:.4f}") for s, (base, tuned) in sorted(found.by_source.items())]
    over = f" over {found.tokens:,} learned tokens" if found.tokens else ""
    table = _table(("held out", "base", "tuned"), rows)
    return f"## Results\n\n{table}\n\nMean cross entropy in nats a token{over}; lower is better. Its uncertainty was not measured."


def _with_intervals(found: HeldOut) -> str:
    """What `evaluate` measured, with the intervals of the differences."""
    losses = [
        (_line(c), f"{c.of:,}", *map(_nats, (c.base, c.tuned)), _range(c, "{:+.4f}", 1))
        for c in found.compared
        if c.group != "rate"
    ]
    rates = [
        (_line(c), f"{c.of:,}", *map(_percent, (c.base, c.tuned)), _range(c, "{:+.0f} %", 100))
        for c in found.compared
        if c.group == "rate"
    ]
    ends = ("base", "tuned", "difference (95 % interval)")
    text = f"## Results\n\n{_table(('held out', 'tokens', *ends), losses)}\n\n"
    text += f"Mean cross entropy in nats a token over {found.tokens:,} learned tokens of the {found.split} split; lower is better."
    if rates:
        text += f"\n\n{_table(('answers to held-out turns', 'turns', *ends), rates)}\n\nShares of greedy answers; higher is better."
    return f"{text}\n\nIntervals: paired bootstrap over conversations."


def _line(compared: Compared) -> str:
    if compared.group == "source":
        return _source(compared.name)
    if compared.group == "all":
        return "**the loss**"
    return ("turns, " if compared.group == "turn" else "") + _plain(compared.name)


def _nats(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _range(compared: Compared, form: str, times: float) -> str:
    if compared.difference is None:
        return "-"
    if compared.low is None or compared.high is None:
        return f"{form.format(times * compared.difference)} (one conversation)"
    low, high = (form.format(times * bound) for bound in (compared.low, compared.high))
    return f"{form.format(times * compared.difference)} ({low} to {high})"


def _serving(facts: Facts, kind: Kind, formats: Set[str]) -> str:
    base = facts.base if facts.on_hub else "BASE"
    commands = {
        "model": ("transformers serve DIR --port 8000", "mlx_lm.server --model DIR --port 8000 --max-tokens 8192"),
        "adapter": (f"mlx_lm.server --model {base} --adapter-path DIR --port 8000 --max-tokens 8192",),
        "gguf": ("llama-server -m DIR/FILE.gguf --port 8000 --jinja",),
        "gguf adapter": ("llama-server -m BASE.gguf --lora DIR/FILE.gguf --port 8000 --jinja",),
    }[kind]
    name = {"model": "DIR", "adapter": base, "gguf": "FILE", "gguf adapter": "FILE"}[kind]
    ask = f"OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none gptme -m local/{name} --tool-format markdown"
    lines = "\n".join(["# one of these, where DIR is this folder" if len(commands) > 1 else "# DIR is this folder", *commands, ask])
    note = "`--tool-format` is to be the one of the conversations that it learned from: markdown, tool or xml."
    if kind == "gguf":
        note += "\n\nWhere a Modelfile stands beside it: `ollama create NAME -f DIR/Modelfile`, and port 11434, `local/NAME`."
    shell = f"```shell\n{lines}\n```\n\n{note}"
    if kind == "adapter" and "mlx-lm" not in formats:
        shell = "mlx-lm does not open this adapter; `mlx-finetune fuse RUN --out DIR` hands back a whole model, which servers take."
    peft = (
        "\n\nIn transformers: `PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), DIR)`."
        if kind == "adapter" and "peft" in formats
        else ""
    )
    return f"## Serving it for gptme\n\n{shell}{peft}"


def _verification(verified: Mapping[str, Any], kind: Kind) -> str:
    """What stands in verification.json, as a table."""
    if not verified:
        return "## Verification\n\nNone."
    flat = _flat(verified)
    rows = [(key, _code(f"{value:.3g}" if isinstance(value, float) else str(value))) for key, value in flat.items()]
    of = "Of the weights before they were written as GGUF; " if kind == "gguf" else ""
    what = f"{of}made before this folder appeared; all of it is in `verification.json`."
    what = what[0].upper() + what[1:]
    return f"## Verification\n\n{what}\n\n{_table(('what', 'found'), rows)}"


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            found |= _flat(value, f"{name}: ")
        elif isinstance(value, list):
            found[name] = ", ".join(map(str, value)) or "none"
        elif value not in (None, ""):
            found[name] = value
    return found


def _licence(facts: Facts, of_base: Mapping[str, Any]) -> str:
    found = of_base.get("license")
    names = [found] if isinstance(found, str) else [each for each in found or [] if isinstance(each, str)]
    if not names:
        lines = ["The base's card names no licence: what may be done with this is for its makers to say."]
    else:
        lines = [f"The base's licence, {_code(', '.join(names))}, holds for this too."]
    if any(SHARE_ALIKE.match(name) for name in names):
        lines.append("It is a share-alike licence: whoever passes this on, changed or not, does so under the same licence.")
    if "other" in names:
        lines.append("Its text is in the base's LICENSE, and may ask for a notice or a name.")
    if "openassistant" in facts.sources:
        lines.append(f"The conversations of OpenAssistant are under {LICENSES['openassistant']}.")
    if "gptme" in facts.sources:
        lines.append("The gptme conversations are private and no part of this; a model can repeat what it was trained on.")
    return "## Licence\n\n" + " ".join(lines)


def _made_from(made: Mapping[str, str]) -> str:
    """By content: who has the same data and base can tell that they are the same."""
    rows = [(MADE_FROM[key], _code(value)) for key, value in made.items() if key in MADE_FROM]
    return f"## Made from\n\n{_table(('what', 'is'), rows)}" if rows else ""


def _versions(facts: Facts, now: Mapping[str, str]) -> str:
    names = sorted({*facts.trained_with, *now})
    rows = [(name, facts.trained_with.get(name, "-"), now.get(name, "-")) for name in names]
    return f"## Versions\n\n{_table(('package', 'in training', 'in verification'), rows)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _code(text: str) -> str:
    """As code in Markdown, on one line; a backtick would end it."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def _plain(text: str) -> str:
    """Words in which Markdown finds nothing to do."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))
