"""The verb `inspect`: what the engine is fed, token by token, in the terminal or on a page, with statistics."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.data.conversation import ROLES
from mlx_finetune.data.dataset import SPLITS, Dataset
from mlx_finetune.data.overview import Overview, overview
from mlx_finetune.data.shown import ShownExample, runs_of
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.data.token_roles import TEMPLATE
from mlx_finetune.errors import UserError
from mlx_finetune.files import refuse_existing
from mlx_finetune.inspect_page import write_page
from mlx_finetune.inspect_terminal import show_examples, show_statistics
from mlx_finetune.models.hub import model_folder
from mlx_finetune.nearest import did_you_mean, nearest
from mlx_finetune.terminal import finish, one_line, progress, say

SHOWN, ON_PAGE = 5, 200  # examples, unless --limit says how many
LONGEST = 5
FROM_INFO = (
    "learned_turns", "exact_turns", "exact_in_one_rendering", "served_as_trained", "turns_of_own_context",
    "tokens_of_own_contexts", "turns_behind_control_text", "placeholder_tokens", "turns_too_long",
)  # fmt: skip  # what `prepare` counted and the arrays do not tell


@dataclass(frozen=True)
class InspectOptions:
    """The options of the verb, as they stand on the command line."""

    dataset: Path
    split: str = "train"
    example: Sequence[int] | None = None
    conversation: str = ""
    source: str = ""
    limit: int | None = None
    whole: bool = False
    html: Path | None = None
    as_json: bool = False


def inspect_command(options: InspectOptions) -> None:
    """`mlx-finetune inspect`."""
    if options.split not in SPLITS:
        raise UserError(
            f"--split {options.split}: no such split", hint=did_you_mean(options.split, SPLITS, f"one of {', '.join(SPLITS)}")
        )
    if options.html:
        refuse_existing(options.html, hint="choose another --html, or move the old one away")
    dataset = Dataset.open(options.dataset)
    template = template_of(dataset)
    examples = overview(options.dataset / f"{options.split}.arrow", template.special_ids)
    chosen = choose(examples, options)
    shown = _read(dataset, template, examples, chosen, options)
    statistics = statistics_of(dataset, examples, options.split)
    if options.html:
        write_page(options.html, statistics, shown, examples.tokens)
    result = statistics | {"html": str(options.html)} if options.html else statistics | {"shown": [e.to_json() for e in shown]}

    def show() -> None:
        show_statistics(statistics)
        if not options.html:
            show_examples(shown, options.whole)

    following = f"mlx-finetune train --model {dataset.info['model']} --data {options.dataset} --out run"
    finish(result, options.as_json, show, options.html, following)


def template_of(dataset: Dataset) -> ChatTemplate:
    """The tokenizer and chat template that the folder was prepared with.

    Raises:
        UserError: the model is gone, or it is another one now, whose texts would not be those of the tokens.
    """
    info, again = dataset.info, "bring the model back to where it was, or run mlx-finetune prepare again"
    if not all(isinstance(info.get(name), str) for name in ("model", "chat_template", "tokenizer")):
        raise UserError(f"{dataset.folder}/dataset.json: does not say which model it is for", hint="run mlx-finetune prepare again")
    try:
        folder = model_folder(info["model"])
    except UserError as error:
        raise UserError(f"{dataset.folder}: prepared for a model that is not there: {error.message}", hint=again) from error
    template = ChatTemplate.load(folder, info["chat_template"])
    if template.fingerprint != info["tokenizer"]:
        raise UserError(f"{folder}: another tokenizer than the one that {dataset.folder} was prepared with", hint=again)
    return template


def choose(examples: Overview, options: InspectOptions) -> list[int]:
    """The examples to show: those named, or up to the limit of those that fit, spread evenly over the split.

    Raises:
        UserError: there is no such example, conversation or source.
    """
    where = f"{options.dataset}: {options.split}"
    if not len(examples):
        raise UserError(f"{where} has no examples", hint=f"--split {SPLITS[0]} shows those that are learned")
    for number in options.example or ():
        if not 0 <= number < len(examples):
            raise UserError(f"--example {number}: {where} has examples 0 to {len(examples) - 1}", hint="leave it out to see some")
    fitting = list(options.example) if options.example else list(range(len(examples)))
    for name, value, column in (
        ("conversation", options.conversation, examples.conversations),
        ("source", options.source, examples.sources),
    ):
        if value:
            fitting = [i for i in fitting if column[i] == value]
            _refuse_none(fitting, name, value, sorted(set(column)), where)
    limit = options.limit or (ON_PAGE if options.html else SHOWN)
    if options.example or len(fitting) <= limit:
        return fitting
    if options.conversation:
        return fitting[:limit]  # its windows in order
    return [fitting[i] for i in np.linspace(0, len(fitting) - 1, limit).astype(int)]


def _refuse_none(fitting: Sequence[int], name: str, value: str, known: Sequence[str], where: str) -> None:
    if not fitting:
        near = nearest(value, known, cutoff=0.5)
        few = f"the nearest is {near}" if near else f"there are {', '.join(known[:5])}{', …' if len(known) > 5 else ''}"
        elsewhere = "another --split may have it" if value not in known else "leave --example out"
        raise UserError(f"--{name} {value}: none in {where}", hint=f"{few}; {elsewhere}")


def _read(
    dataset: Dataset, template: ChatTemplate, examples: Overview, chosen: Sequence[int], options: InspectOptions
) -> list[ShownExample]:
    """The very arrays that are fed to the engine, decoded."""
    store = {"train": dataset.train, "valid": dataset.valid, "test": dataset.test}[options.split]
    where = f"{options.split} in {dataset.folder}"
    say(one_line(f"{len(chosen):,} of {len(examples):,} examples of {where}, as {dataset.info['model']} reads them"))
    advance: Callable[..., None]
    with progress("decode") if options.html else nullcontext(lambda done, total: None) as advance:
        shown: list[ShownExample] = []
        for i in chosen:
            example = store[i]
            shown.append(ShownExample(i, example, examples.part(i), tuple(runs_of(example, template))))
            advance(len(shown), len(chosen))
        return shown


def statistics_of(dataset: Dataset, examples: Overview, split: str) -> dict[str, Any]:
    """Counts of the split from its arrays, and what `dataset.json` says of its turns, of roles and of the template."""
    info = dataset.info
    sources, conversations = np.array(examples.sources), np.array(examples.conversations)
    by_role = info[split].get("tokens_by_role")
    by_source = {name: _counts(examples, conversations, sources == name) for name in sorted(set(examples.sources))}
    for name, counts in by_source.items() if by_role else ():
        counts["by_role"] = _roles(by_role.get(name, {}), counts["learned_tokens"])
    whole = _counts(examples, conversations, np.full(len(examples), True))
    together = sum((Counter(counts) for counts in by_role.values()), Counter()) if by_role else {}
    return {
        "dataset": str(dataset.folder),
        "model": info["model"],
        "split": split,
        **whole,
        "by_source": by_source,
        "by_role": _roles(together, whole["learned_tokens"]) if by_role else None,
        "median_tokens": float(np.median(examples.tokens)),
        "longest": [
            _place(examples, i) | {"tokens": int(examples.tokens[i]), "learned_tokens": int(examples.learned[i])}
            for i in _largest(examples.tokens)
        ],
        "longest_turns": [
            _place(examples, examples.turn_examples[i])
            | {"message": int(examples.turn_messages[i]), "tokens": int(examples.turn_tokens[i])}
            for i in _largest(examples.turn_tokens)
            if examples.turn_tokens[i]
        ],
        "weighed_tokens": int(examples.weighed.sum()),
        "max_length": info["max_length"],
        **{name: info[split][name] for name in FROM_INFO},
        "role_policy": info["role_policy"],
        "template_oddities": info["template_oddities"],
    }


def _largest(numbers: np.ndarray) -> list[int]:
    return list(np.argsort(-numbers, kind="stable")[:LONGEST].tolist())


def _place(examples: Overview, index: int) -> dict[str, Any]:
    return {"example": int(index), "conversation": examples.conversations[index], "source": examples.sources[index]}


def _counts(examples: Overview, conversations: np.ndarray, among: np.ndarray) -> dict[str, Any]:
    tokens, learned = int(examples.tokens[among].sum()), int(examples.learned[among].sum())
    return {
        "examples": int(among.sum()),
        "conversations": len(set(conversations[among].tolist())),
        "tokens": tokens,
        "learned_tokens": learned,
        "learned_share": learned / max(tokens, 1),
    }


def _roles(tokens: Mapping[str, int], learned: int) -> dict[str, dict[str, Any]]:
    """Of each role, and of the template's own text, how many tokens are read and how many learned: those of assistants alone."""
    known = [name for name in (*ROLES, TEMPLATE) if name in tokens]
    learned_of = {name: learned if name == "assistant" else 0 for name in known}
    return {
        name: {"tokens": tokens[name], "learned_tokens": learned_of[name]}
        | {"learned_share": learned_of[name] / max(tokens[name], 1)}
        for name in known
    }
