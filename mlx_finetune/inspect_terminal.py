"""What `inspect` prints: statistics as tables, and examples with the learned text in colour, or between marks."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from mlx_finetune.data.shown import Folded, Run, ShownExample, folded, visible
from mlx_finetune.terminal import table

STYLES = {  # by whether it is learned, and whether it is a control token
    (True, False): "bold green",
    (True, True): "black on green",
    (False, False): "dim",
    (False, True): "cyan",
}
OTHER_WEIGHT = {False: "bold yellow", True: "black on yellow"}  # by whether it is a control token
TIMES = "\u00d7"
TURNS = {
    "learned_turns": "learned turns",
    "exact_turns": "of them after exactly the tokens that are served",
    "turns_of_own_context": "examples that are one turn in a context of its own",
    "served_as_trained": "turns with all that came before them",
    "turns_behind_control_text": "turns after the name of a control token, kept as text",
    "placeholder_tokens": "tokens in place of secrets, read and not learned",
    "turns_too_long": "turns too long for a window, not learned",
}


def show_statistics(statistics: Mapping[str, Any]) -> None:
    """Counts by source, the longest examples, and what the template does."""
    header = ("", "examples", "conversations", "tokens", "learned", "share")
    rows = [_counts(visible(name), counts) for name, counts in statistics["by_source"].items()]
    table(f"{statistics['split']}: {statistics['dataset']}", [*rows, _counts("all", statistics)], header)
    longest = [
        (f"example {e['example']}", visible(e["source"]), e["conversation"], f"{e['tokens']:,}", f"{e['learned_tokens']:,}")
        for e in statistics["longest"]
    ]
    table(
        f"longest (at most {statistics['max_length']:,}; the median is {statistics['median_tokens']:,.0f})",
        longest,
        ("", "source", "conversation", "tokens", "learned"),
    )
    table("turns", [(text, f"{statistics[name]:,}") for name, text in TURNS.items()])
    for line in template_lines(statistics):
        print(line)
    print()


def template_lines(statistics: Mapping[str, Any]) -> list[str]:
    """The role policy, the reason for it, and the template's oddities."""
    policy = statistics["role_policy"]
    lines = [f"roles {policy['name']}: {policy['what']}", *([policy["why"]] if policy["why"] else [])]
    return [visible(line) for line in (*lines, *statistics["template_oddities"])]


def _counts(name: str, counts: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = (f"{counts[key]:,}" for key in ("examples", "conversations", "tokens", "learned_tokens"))
    return (name, *numbers, f"{100 * counts['learned_share']:.1f} %")


def show_examples(shown: Sequence[ShownExample], whole: bool) -> None:
    """One after the other; long context is folded unless `whole`."""
    from rich.console import Console
    from rich.text import Text

    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    colour = console.is_terminal and not console.no_color and console.color_system is not None
    print(legend(colour))
    for each in shown:
        print()
        parts = list(each.runs) if whole else folded(each.runs)
        heading = f"── example {each.number} · {' · '.join(map(visible, each.facts))}"
        if not colour:
            print(heading)
            print(plain(parts).rstrip("\n"))
            continue
        text = Text()
        text.append(heading + "\n", "bold")
        for part in parts:
            text.append(weight_mark(part.weight) + visible(part.text) if isinstance(part, Run) else note(part), style_of(part))
        text.rstrip()
        console.print(text)


def legend(colour: bool) -> str:
    """How to read what follows."""
    if colour:
        return "learned: green (yellow: with another weight than 1); only read: dim; control tokens: on a ground, or cyan"
    return f"learned: ⟦…⟧ (⟦N{TIMES} …⟧: with another weight than 1); only read: the rest; control tokens: ⟨…⟩"


def style_of(part: Run | Folded) -> str:
    """As rich names styles."""
    if isinstance(part, Folded):
        return "italic blue"
    return OTHER_WEIGHT[part.special] if part.learned and part.weight != 1 else STYLES[part.learned, part.special]


def plain(parts: Sequence[Run | Folded]) -> str:
    """The same without colour: learned text between marks, control tokens between others."""
    texts = []
    for weight, same in groupby(parts, key=lambda part: part.weight if isinstance(part, Run) else 0.0):
        text = "".join(note(part) if isinstance(part, Folded) else _plain(part) for part in same)
        texts.append(f"⟦{weight_mark(weight)}{text}⟧" if weight > 0 else text)
    return "".join(texts)


def _plain(run: Run) -> str:
    return f"⟨{visible(run.text)}⟩" if run.special else visible(run.text)


def weight_mark(weight: float) -> str:
    """Empty for a weight of 1, and where nothing is learned."""
    return f"{weight:g}{TIMES} " if weight not in (0, 1) else ""


def note(part: Folded) -> str:
    """What stands in place of folded context."""
    return f"\n… {part.tokens:,} tokens of context …\n"
