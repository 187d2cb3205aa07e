"""The figures of train_speed.py from what was measured, and their tables. CPU seconds throughout, medians over the repetitions."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from train_speed_data import NAMES, Shipped, width_of

Figures = dict[str, Any]
Key = tuple[str, bool, bool, str, str, int]  # side, cut model, checkpointing, kind, letter of the data, tokens
Measured = Mapping[Key, Figures]  # "cpu", "wall": medians of `repetitions`; "peak": bytes over the weights; "loss"
PHASES = {
    "step": "a whole step",
    "forward": "of it: the loss alone, forward",
    "head_and_loss": "of it: head and loss, both ways",
    "attention": "of it: attention beyond blocks of 128, both ways",
    "layers": "of it: all else in the layers, both ways",
    "fixed": "of it: what a step of 32 tokens takes (tracing, optimizer)",
}
SETTING = """\
SmolLM2-135M-Instruct in float32, LoRA of rank 8 on all linear layers of the last {layers} of 30; "cut": its first {cut_layers}
layers, all adapted, on both sides (head and loss are a larger part of it than of the whole model). CPU seconds; memory is
MLX's peak over the weights. "Corrected": mlx_lm.lora's own training function with our windows and masks, sorted, padded to a
multiple of 32, one row at a time, so that nothing else is padded."""
ON_DATA = """\
Shares are of all assistant tokens of the collection. mlx_lm.lora as shipped reads whole conversations, cut at the length, four
in a batch up to 1,024; with --mask-prompt it learns the last turn alone, without it all that it reads, of which the assistant's
tokens are counted here; "-" where it learns none. "NaN": batches with nothing to learn (--mask-prompt), after which the adapter
is lost. The peer's time is the sum over its rows of what a row of that width took above. Ours folds at most as many
tokens together as the longest row has, for the same class of memory; "folded": all of the step, as `train` does where memory allows
(columns behind "tokens computed": both)."""


def median_of(repetitions: Sequence[Figures]) -> Figures:
    """Of each figure with a fraction: seconds, and losses; counts and peaks are the same in all."""
    timed = [name for name, value in repetitions[0].items() if isinstance(value, float)]
    times = {name: float(np.median([one[name] for one in repetitions])) for name in timed}
    return repetitions[0] | times | {"repetitions": len(repetitions)}


def curve(measured: Measured, cut: bool, checkpoint: bool, name: str, widest: int) -> Callable[[int], float] | None:
    """`name` of the peer's step on one row of a width, from the widths that were measured: log-log between them.

    None where none as wide as `widest` was measured: beyond them a token costs more, and how much more is not known. What is in
    a row makes no difference to the peer, whose shapes are all fixed by the width.
    """
    known = {key[5]: one[name] for key, one in measured.items() if key[:4] == ("peer", cut, checkpoint, "row")}
    if max(known, default=0) < widest:
        return None
    widths = np.array(sorted(known))
    per_token = np.log([known[width] / width for width in widths])
    return lambda width: width * math.exp(np.interp(math.log(width), np.log(widths), per_token))


def row_figures(measured: Measured) -> list[Figures]:
    """Rows filled to a length, the same on both sides."""
    table = []
    for key, peer in measured.items():
        side, cut, checkpoint, kind, letter, length = key
        ours = measured.get(("ours", *key[1:]))
        if side != "peer" or kind != "row":
            continue
        one: Figures = {"cut_model": cut, "checkpointing": checkpoint, "tokens": length, "learned": peer["learned"]}
        for name, figures in (("peer", peer), ("ours", ours)):
            if figures:
                one[name] = {n: figures[n] for n in ("cpu", "wall", "peak", "loss", "repetitions")}
        if ours:
            one |= {"times_faster": peer["cpu"] / ours["cpu"], "memory_ratio": ours["peak"] / peer["peak"]}
            one["loss_difference"] = abs(ours["loss"] / peer["loss"] - 1)
        if as_shipped := measured.get(("peer", cut, checkpoint, "shipped", letter, length)):
            one["shipped_to_corrected"] = as_shipped["cpu"] / as_shipped["width"] * length / peer["cpu"]
        table.append(one)
    return sorted(table, key=lambda one: (one["cut_model"], one["checkpointing"], one["tokens"]))


def exponents(rows: Sequence[Figures]) -> list[Figures]:
    """Slope of log seconds a token on log tokens by least squares; 0: a token costs the same in a row of any length."""
    found = []
    for side in ("peer", "ours"):
        for cut, checkpoint in ((False, False), (False, True), (True, True)):
            points = [
                (math.log(one["tokens"]), math.log(one[side]["cpu"] / one["tokens"]))
                for one in rows
                if side in one and one["tokens"] >= 512 and (one["cut_model"], one["checkpointing"]) == (cut, checkpoint)
            ]
            if len(points) > 1:
                lengths = [round(math.exp(x)) for x, _ in points]
                x, y = np.array(points).T
                slope = float(np.polyfit(x, y, 1)[0])
                found.append({"side": side, "cut_model": cut, "checkpointing": checkpoint, "lengths": lengths, "exponent": slope})
    return found


def data_figures(measured: Measured, cells: Iterable[Any]) -> list[Figures]:
    """Learned tokens a second on real data; what the peer takes comes from its curve."""
    table = []
    for cell in cells:
        widest = max(*map(width_of, cell.lengths), *(width for _, width in cell.shipped.shapes))
        seconds, peak = (curve(measured, cell.cut, cell.checkpoint, name, widest) for name in ("cpu", "peak"))
        ours, folded = (
            measured.get(("ours", cell.cut, cell.checkpoint, kind, cell.letter, cell.length)) for kind in ("data", "folded")
        )
        one: Figures = {"data": NAMES[cell.letter], "tokens": cell.length, "cut_model": cell.cut, "checkpointing": cell.checkpoint}
        one |= {"examples": len(cell.lengths), "step_tokens": sum(cell.lengths), "step_learned": cell.learned}
        one["share"] = {"ours": cell.share, **shares(cell.shipped)}
        one["nan_batches"] = [cell.shipped.nan_batches, len(cell.shipped.shapes)]
        if ours:
            one["ours"] = {
                "learned_a_second": ours["learned"] / ours["cpu"],
                **{n: ours[n] for n in ("cpu", "wall", "peak", "repetitions", "computed")},
            }
        if folded:
            one["folded"] = {
                "learned_a_second": folded["learned"] / folded["cpu"],
                **{n: folded[n] for n in ("cpu", "peak", "computed")},
            }
        if seconds and peak:
            taken = sum(seconds(width_of(length)) for length in cell.lengths)
            epoch = sum(rows * seconds(width) for rows, width in cell.shipped.shapes)
            one["corrected"] = {
                "learned_a_second": cell.learned / taken,
                "cpu": taken,
                "peak": peak(max(map(width_of, cell.lengths))),
            }
            one["shipped"] = {
                "learned_a_second": cell.shipped.learned / epoch,
                "masked_a_second": cell.shipped.learned_masked / epoch,
            }
        if "ours" in one and "corrected" in one:
            one["times_corrected"] = one["ours"]["learned_a_second"] / one["corrected"]["learned_a_second"]
            one["memory_ratio"] = one["ours"]["peak"] / one["corrected"]["peak"]
            for name, rate in (("times_shipped", "learned_a_second"), ("times_shipped_masked", "masked_a_second")):
                one[name] = one["ours"]["learned_a_second"] / one["shipped"][rate] if one["shipped"][rate] else None
        if "folded" in one and "corrected" in one:
            one["folded_times_corrected"] = one["folded"]["learned_a_second"] / one["corrected"]["learned_a_second"]
            rate = one["shipped"]["learned_a_second"]
            one["folded_times_shipped"] = one["folded"]["learned_a_second"] / rate if rate else None
        whole = measured.get(("peer", cell.cut, cell.checkpoint, "data", cell.letter, cell.length))
        if whole and "corrected" in one:  # measured as well, to see how near the curve comes
            one["curve_to_measured"] = one["corrected"]["cpu"] / whole["cpu"]
        table.append(one)
    return table


def shares(shipped: Shipped) -> dict[str, float]:
    """Of the assistant's tokens, what mlx_lm.lora learns."""
    return {"shipped": shipped.learned / shipped.total, "shipped_masked": shipped.learned_masked / shipped.total}


def profile_figures(measured: Measured) -> dict[str, Figures]:
    """CPU seconds of the parts of a step: differences between steps that lack a part."""
    found = {}
    for (side, _, _, kind, _, length), one in measured.items():
        if kind == "profile":
            parts = {
                "head_and_loss": one["step"] - one["without_head"],
                "attention": one["without_head"] - one["without_head_in_blocks"],
            }
            parts["layers"] = one["without_head_in_blocks"] - one["fixed"]
            found[side] = {"tokens": length} | {name: (one | parts)[name] for name in PHASES}
    return found


def report(figures: Figures) -> str:
    """All of it as Markdown."""
    machine = figures["machine"]
    lines = [
        "# Training speed and memory beside mlx_lm.lora",
        "",
        f"Made by `benchmarks/train_speed.py`{' --quick' if figures['quick'] else ''} in {figures['minutes']:.0f} minutes: "
        f"{machine['machine']}; {', '.join(f'{name} {number}' for name, number in machine['versions'].items())}; BLAS "
        f"{machine['blas']}, one thread. Our settings beside the adapter: {figures['options'] or 'the defaults'}.",
        "",
        SETTING.format(**figures),
        "",
        "## Rows filled to a length, batch 1",
        "",
        *_table(ROWS, figures["rows"]),
        "",
        "## Data: one step of real examples",
        "",
        ON_DATA,
        "",
        *_table(DATA, figures["data"]),
        "",
        "## How cost a token grows with the length of a row",
        "",
        *_table(EXPONENTS, figures["exponents"]),
        "",
        *_profile(figures["profile"]),
        *(["## Not measured", "", *(f"- {reason}" for reason in figures["skipped"])] if figures["skipped"] else []),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _at(one: Figures, *path: str) -> Any:
    """A figure inside figures; None where it was not measured."""
    value: Any = one
    for name in path:
        value = value.get(name) if value else None
    return value


def _gigabytes(one: Figures, side: str) -> str:
    peak = _at(one, side, "peak")
    return _number(peak / 1e9 if peak else None, ".2f")


def _milliseconds(one: Figures, side: str) -> str:
    seconds = _at(one, side, "cpu")
    return _number(seconds / one["tokens"] * 1e3 if seconds else None, ".2f")


Column = Callable[[Figures], str]
MODEL: dict[str, Column] = {
    "model": lambda one: "cut" if one["cut_model"] else "whole",
    "checkpointing": lambda one: "yes" if one["checkpointing"] else "no",
}
ROWS: dict[str, Column] = MODEL | {
    "tokens": lambda one: f"{one['tokens']:,}",
    "mlx_lm.lora ms a token": lambda one: _milliseconds(one, "peer"),
    "ours ms a token": lambda one: _milliseconds(one, "ours"),
    "times faster": lambda one: _number(one.get("times_faster"), ".2f"),
    "mlx_lm.lora GB": lambda one: _gigabytes(one, "peer"),
    "ours GB": lambda one: _gigabytes(one, "ours"),
    "ours to theirs": lambda one: _number(one.get("memory_ratio"), ".2f"),
    "losses differ by": lambda one: _number(one.get("loss_difference"), ".0e"),
    "time as shipped to corrected": lambda one: _number(one.get("shipped_to_corrected"), ".2f"),
    "repetitions": lambda one: f"{_at(one, 'peer', 'repetitions')}",
}
DATA: dict[str, Column] = {
    "data": lambda one: one["data"],
    "window": lambda one: f"{one['tokens']:,}",
    **MODEL,
    "examples, tokens, learned": lambda one: f"{one['examples']}, {one['step_tokens']:,}, {one['step_learned']:,}",
    "learned at all: ours": lambda one: f"{_at(one, 'share', 'ours'):.0%}",
    "shipped, --mask-prompt": lambda one: f"{_at(one, 'share', 'shipped_masked'):.0%}",
    "shipped": lambda one: f"{_at(one, 'share', 'shipped'):.0%}",
    "NaN": lambda one: "{} of {}".format(*one["nan_batches"]),
    "learned tokens a second: ours": lambda one: _number(_at(one, "ours", "learned_a_second"), ".1f"),
    "corrected": lambda one: _number(_at(one, "corrected", "learned_a_second"), ".1f"),
    "times corrected": lambda one: _number(one.get("times_corrected"), ".2f"),
    "times shipped": lambda one: _number(one.get("times_shipped"), ".2f"),
    "times shipped, --mask-prompt": lambda one: _number(one.get("times_shipped_masked"), ".1f"),
    "folded: times corrected": lambda one: _number(one.get("folded_times_corrected"), ".2f"),
    "times shipped ": lambda one: _number(one.get("folded_times_shipped"), ".2f"),
    "tokens computed": lambda one: f"{_at(one, 'ours', 'computed') or 0:,}, {_at(one, 'folded', 'computed') or 0:,}",
    "GB: ours": lambda one: _gigabytes(one, "ours"),
    "GB: folded": lambda one: _gigabytes(one, "folded"),
    "ours to corrected": lambda one: _number(one.get("memory_ratio"), ".2f"),
}
EXPONENTS: dict[str, Column] = {
    "side": lambda one: {"peer": "mlx_lm.lora", "ours": "ours"}[one["side"]],
    **MODEL,
    "lengths": lambda one: f"{min(one['lengths']):,} to {max(one['lengths']):,}",
    "exponent": lambda one: f"{one['exponent']:.2f}",
}


def _table(columns: Mapping[str, Column], rows: Iterable[Figures]) -> list[str]:
    cells = [list(columns), ["---"] * len(columns), *([column(one) for column in columns.values()] for one in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def _profile(profile: Mapping[str, Figures]) -> list[str]:
    if not profile:
        return []
    tokens = next(iter(profile.values()))["tokens"]
    lines = [f"## Where the time of a step goes, {tokens:,} tokens without checkpointing", ""]
    lines += ["By steps that lack a part, each measured once or more; the whole model; CPU seconds.", ""]
    names = {"peer": "mlx_lm.lora", "ours": "ours"}
    columns: dict[str, Column] = {"part": lambda one: one["part"]}
    columns |= {names[side]: lambda one, side=side: f"{one[side]:.2f}" for side in profile}  # type: ignore[misc]
    return [
        *lines,
        *_table(columns, ({"part": said} | {s: profile[s][name] for s in profile} for name, said in PHASES.items())),
        "",
    ]
