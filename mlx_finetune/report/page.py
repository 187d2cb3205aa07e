"""The page of `report`: one file that needs nothing else, in which every text of a conversation is only text."""

from collections.abc import Iterator, Sequence
from importlib.resources import files

from mlx_finetune.report.curves import all_curves
from mlx_finetune.report.figures import figure
from mlx_finetune.report.from_what import data, learned, settings, using
from mlx_finetune.report.html import count, digest, paragraph, section, text
from mlx_finetune.report.marked import marked
from mlx_finetune.report.of_run import OfRun
from mlx_finetune.report.results import before_after, headline, learning_samples, samples

METHODS = {"lora": "a LoRA adapter", "dora": "a DoRA adapter", "full": "all of its weights"}
PRIVATE = "This page holds text of the conversations that it tells of: look at it before you pass it on."


def page(of: OfRun, articles: Sequence[str], missing: str) -> Iterator[str]:
    """The page, part by part. `articles`: examples token by token, as HTML; `missing`: why there are none."""
    own = files("mlx_finetune.report")
    style, script = (own.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "sort.js"))
    policy = f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'; base-uri 'none'; form-action 'none'"
    title = f"{text(of.base)}, tuned"
    yield f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    yield f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{style}</style>\n</head>\n<body>\n'
    parts = [before_after(of), curves(of), samples(of), learning_samples(of), learned(of, articles, missing), data(of)]
    parts += [settings(of), using(of)]
    heading = f"<h1>{text(of.base)} <span>tuned{_on(of)}</span></h1>\n"
    yield f"<header>{heading}{about(of)}{headline(of)}{contents(parts)}</header>\n<main>\n"
    yield from parts
    yield f"</main>\n<footer>{paragraph(f'Made by mlx-finetune from {text(of.run)}. {PRIVATE}', 'faint')}</footer>\n"
    yield f"<script>{script}</script>\n</body>\n</html>\n"


def _on(of: OfRun) -> str:
    if of.prepared is None:
        return ""
    counts = of.prepared.train.conversations
    return f" on {count(sum(counts.values()), 'conversation')}"


def about(of: OfRun) -> str:
    """Method, data, length and day, in words."""
    config, facts = of.config, list[str]()
    method = METHODS[config.fine_tune_type]
    width = "" if config.fine_tune_type == "full" else f" of rank {config.rank}"
    facts.append(f"{method}{width}" + (f" on {config.quantization} weights" if config.quantization != "none" else ""))
    if of.prepared:
        sources = of.prepared.train.conversations
        facts.append(f"{count(of.prepared.train.learned_tokens, 'learned token')} of {', '.join(map(text, sources))}")
    facts.append(state(of))
    facts.append(f"{text(of.progress.engine)} on {text(of.progress.device)}" if of.progress.device else "")
    seconds = sum(row.get("seconds", 0) for row in of.train)
    facts += [f"{_duration(seconds)} of training" if seconds else "", f"{of.day:%-d %B %Y}" if of.day else ""]
    return paragraph(" · ".join(filter(None, facts)), "about")


def state(of: OfRun) -> str:
    """How far it came."""
    if of.steps is None:
        return count(of.done, "step")
    if of.done >= of.steps:
        return f"{count(of.done, 'step')}, finished"
    if of.stopped_early:
        return f"stopped early at step {of.done:,} of {of.steps:,}: {of.stopped_early}"
    again = f"mlx-finetune train --resume --out {text(of.typed)}"
    return f"step {of.done:,} of {of.steps:,}: still going, or stopped (<code>{again}</code>)"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def contents(parts: Sequence[str]) -> str:
    """Links to the sections that are there."""
    links = []
    for part in filter(None, parts):
        name, title = part.partition('id="')[2].partition('"')[0], part.partition("<h2>")[2].partition("</h2>")[0]
        links.append(f'<a href="#{name}">{title}</a>')
    return f'<nav aria-label="Contents">{"".join(links)}</nav>\n'


def curves(of: OfRun) -> str:
    """All figures of the training."""
    found = all_curves(of.train, of.valid, of.config.max_grad_norm)
    if not found:
        return section("curves", "How it learned", paragraph("Nothing is measured yet: the run has just begun.", "missing"))
    told = paragraph("Running mean: of the last ten or so steps, by token.", "faint")
    return section("curves", "How it learned", f"<div class=figures>{''.join(map(figure, found))}</div>\n", told, marked(of))
