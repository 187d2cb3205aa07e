"""What `inspect` prints: statistics as tables, and examples with the learned text in colour, or between marks."""

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from mlx_finetune.data.shown import Folded, Run, ShownExample, folded, visible
from mlx_finetune.data.token_roles import TEMPLATE
from mlx_finetune.prepared import COUNTS, SHARES
from mlx_finetune.terminal import table

if TYPE_CHECKING:
    from rich.text import Text

STYLES = {  # by whether it is learned, and whether it is a control token
    (True, False): "bold green",
    (True, True): "black on green",
    (False, False): "dim",
    (False, True): "cyan",
}
OTHER_WEIGHT = {False: "bold yellow", True: "black on yellow"}  # by whether it is a control token
TIMES = "\u00d7"
ROLE_HEADER = ("role", "tokens", "of all", "learned", "share")
LONGEST_HEADER = ("example", "source", "conversation", "tokens", "learned")
TURN_HEADER = ("example", "source", "conversation", "message", "tokens")
LEGEND = f"learned: ⟦…⟧ (⟦N{TIMES} …⟧: with another weight than 1); only read: the rest; control tokens: ⟨…⟩"
TURNS = {
    "learned_turns": COUNTS["learned_turns"],
    "exact_turns": SHARES["exact_turns"][1],
    "turns_of_own_context": COUNTS["turns_of_own_context"],
    "served_as_trained": SHARES["served_as_trained"][1],
    "turns_behind_control_text": COUNTS["turns_behind_control_text"],
    "placeholder_tokens": COUNTS["placeholder_tokens"],
    "weighed_tokens": "tokens learned with another weight than 1",
    "turns_too_long": COUNTS["turns_too_long"],
}


TEMPLATE_ROW = "chat template"
NOT_COUNTED = "tokens by role: not counted when this was prepared; mlx-finetune prepare counts them"


def show_statistics(statistics: Mapping[str, Any]) -> None:
    """Counts by source and role, the longest examples and turns, and what the template does."""
    header = ("", "examples", "conversations", "tokens", "learned", "share")
    rows = [_counts(visible(name), counts) for name, counts in statistics["by_source"].items()]
    table(visible(f"{statistics['split']}: {statistics['dataset']}"), [*rows, _counts("all", statistics)], header)
    if statistics["by_role"]:
        table("tokens by role", role_rows(statistics), ROLE_HEADER)
    else:
        print(NOT_COUNTED + "\n")
    most = f"at most {statistics['max_length']:,}; the median is {statistics['median_tokens']:,.0f}"
    listed: tuple[tuple[str, str, Sequence[str]], ...] = (
        (f"longest examples ({most})", "longest", LONGEST_HEADER),
        ("longest learned turns", "longest_turns", TURN_HEADER),
    )
    for title, name, columns in listed:
        if statistics[name]:
            table(title, longest_rows(statistics[name]), columns)
    table("turns", [(text, f"{statistics[name]:,}") for name, text in TURNS.items()])
    for line in template_lines(statistics):
        print(line)
    print()


def role_rows(statistics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Of each role, what is read and what of it is learned."""
    rows = []
    for name, role in statistics["by_role"].items():
        numbers, shares = (role["tokens"], role["learned_tokens"]), (role["tokens"] / statistics["tokens"], role["learned_share"])
        cells = [cell for n, share in zip(numbers, shares, strict=True) for cell in (f"{n:,}", f"{100 * share:.1f} %")]
        rows.append((TEMPLATE_ROW if name == TEMPLATE else name, *cells))
    return rows


def longest_rows(longest: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Of each, where it is and how long."""
    numbers = ("message", "tokens", "learned_tokens")
    return [
        (f"{e['example']}", visible(e["source"]), visible(e["conversation"]), *(f"{e[name]:,}" for name in numbers if name in e))
        for e in longest
    ]


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
    if colour:
        console.print(legend())
    else:
        print(LEGEND)
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
        for before, part in pairwise([Run((), 0.0), *parts]):
            text.append(_coloured(part, before), style_of(part))
        text.rstrip()
        console.print(text)


def legend() -> "Text":
    """How to read what follows, in its own colours."""
    from rich.text import Text

    parts = (
        ("learned", Run((), 1.0)),
        (f"0.5{TIMES} learned with another weight than 1", Run((), 0.5)),
        ("only read", Run((), 0.0)),
    )
    controls = (("control token, learned", Run((), 1.0, True)), ("control token, only read", Run((), 0.0, True)))
    return Text("   ").join(Text(text, style_of(run)) for text, run in (*parts, *controls))


def _coloured(part: Run | Folded, before: Run | Folded) -> str:
    if isinstance(part, Folded):
        return note(part)
    again = isinstance(before, Run) and before.weight == part.weight
    return ("" if again else weight_mark(part.weight)) + visible(part.text)


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
