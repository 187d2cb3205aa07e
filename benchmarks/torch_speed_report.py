"""The figures of torch_speed.py from what was measured, and their tables. Wall seconds, medians over the rounds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from textwrap import fill
from typing import Any

from torch_speed_data import SHARE
from train_speed_report import Column, Figures, _number, _table, median_of

FASTER, SMALLER = 1.3, 0.75  # goals: times as fast at least, of their memory at most
SAME = {"float32": 1e-3, "bfloat16": 2e-2}  # losses, as a share; 16 bits round differently in another order
NAMES = {"ours": "ours", "trl": "TRL", "hf": "HF", "unsloth": "unsloth"}
BY_SETTING = """per_device_train_batch_size gradient_accumulation_steps gradient_checkpointing max_length batch_size
gradient_accumulation grad_checkpoint pack_length""".split()
METHOD = """\
LoRA of rank 8 and alpha 16 on all linear layers but the head, no dropout, from the same numbers; AdamW at the same constant rate
without decay, gradients clipped to 1. "TRL": `SFTTrainer` with peft on rows that are tokenized already, its loss, padding and order
its own; "HF": transformers' `Trainer` with peft and `DataCollatorForSeq2Seq`. "rows": all of one length, {share:.0%} of the tokens
learned in several turns; "mix": {mix} gptme windows of different lengths as our `prepare` makes them, each once, in a side's own
order. "batch": rows in a micro-batch x micro-batches in a step. Learned tokens a second by the clock, from the end of a
warm-up step to the end of the last (on rows, {steps} later); "by CPU seconds": the same ratio by what all threads together took,
which neighbours on the machine disturb less; "cores busy": the one by the other. Memory: {memory}, less the weights
({weights:,.0f} MB) and what was held before they were loaded. "Losses differ by": the most between sides, as a share, in the
first step, and on rows in each."""
MEMORY = {
    True: "the most that torch had allocated on the GPU (torch.cuda.max_memory_allocated)",
    False: "the most resident memory of the process (VmHWM of /proc/self/status, lowered once the model is there; ru_maxrss where "
    "this is not Linux)",
}


def cells(results: Mapping[Any, Sequence[Figures]], operations: Mapping[Any, float], peak: float | None) -> list[Figures]:
    """By setting: each side's medians, and ours beside each peer."""
    table = []
    for setting in dict.fromkeys(setting for setting, _ in results):
        sides = {side: median_of(done) for (of, side), done in results.items() if of == setting}
        one: Figures = asdict(setting) | {"operations": operations[setting], "sides": {}}
        for side, figures in sides.items():
            kept = {name: value for name, value in figures.items() if name not in ("settings", "device")}
            kept |= {"learned_a_second": figures["learned"] / figures["seconds"], "cores": figures["cpu"] / figures["seconds"]}
            if peak:
                kept["utilisation"] = operations[setting] / figures["seconds"] / peak / 1e12
            one["sides"][side] = kept
        ours = one["sides"].get("ours")
        one["beside"] = {s: beside(ours, figures) for s, figures in one["sides"].items() if ours and s != "ours"}
        one["loss_difference"] = loss_difference(list(one["sides"].values()), setting.kind == "rows")
        table.append(one)
    return table


def beside(ours: Figures, peer: Figures) -> Figures:
    """Ratios, and whether the goals are reached."""
    faster, memory = ours["learned_a_second"] / peer["learned_a_second"], ours["peak"] / peer["peak"]
    by_cpu = ours["learned"] / ours["cpu"] / (peer["learned"] / peer["cpu"])
    found = {"times_faster": faster, "times_faster_by_cpu": by_cpu, "memory_ratio": memory}
    return found | {"fast_enough": faster >= FASTER, "small_enough": memory <= SMALLER}


def loss_difference(sides: Sequence[Figures], every_step: bool) -> float:
    """The most by which one side's loss differs from another's, as a share of it."""
    steps = zip(*(side["losses"] for side in sides), strict=True) if every_step else [[side["losses"][0] for side in sides]]
    return max(float(max(losses) / min(losses)) - 1 for losses in steps)


def unequal(table: Sequence[Figures], dtype: str) -> list[str]:
    """Where the sides did not compute the same, and what."""
    found = []
    for one in table:
        named = f"{one['kind']} {one['length']}, batch {one['batch']}, checkpointing {one['checkpoint']}"
        if one["loss_difference"] > SAME[dtype]:
            found.append(f"{named}: losses differ by {one['loss_difference']:.1e}")
        for what in ("learned", "adapted", "weights", "threads"):
            counts = {side: figures[what] for side, figures in one["sides"].items()}
            if len(set(counts.values())) > 1:
                found.append(f"{named}: {what} {counts}")
    return found


def goals(table: Sequence[Figures]) -> Figures:
    """How often each goal is reached, against each peer."""
    found: Figures = {}
    for side in dict.fromkeys(side for one in table for side in one["beside"]):
        against = [one["beside"][side] for one in table if side in one["beside"]]
        faster, memory = ([one[name] for one in against] for name in ("times_faster", "memory_ratio"))
        found[side] = {
            "speed": {"goal": FASTER, "reached": sum(one["fast_enough"] for one in against), "worst": min(faster)},
            "speed_by_cpu": {"goal": FASTER, "reached": sum(one["times_faster_by_cpu"] >= FASTER for one in against)},
            "memory": {"goal": SMALLER, "reached": sum(one["small_enough"] for one in against), "worst": max(memory)},
            "settings": len(against),
        }
    return found


def report(figures: Figures) -> str:
    """All of it as Markdown."""
    sides = [side for side in NAMES if any(side in one["sides"] for one in figures["cells"])]
    speeds = SHAPE | _speed_columns(sides, figures["device"] == "cpu", bool(figures["peak_tflops"]))
    lines = [
        "# Training speed and memory of the torch engine beside TRL and transformers",
        "",
        *_head(figures),
        "",
        *_goal_lines(figures),
        *("", "## Learned tokens a second", "", *_table(speeds, figures["cells"])),
        *("", "## Memory, and what is the same", "", *_table(SHAPE | _memory_columns(sides), figures["cells"])),
        *("", "## Settings", "", *_settings(figures["settings"]), ""),
        *(["## Not measured", "", *(f"- {reason}" for reason in figures["skipped"])] if figures["skipped"] else []),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _head(figures: Figures) -> list[str]:
    """Where this was measured, and what."""
    versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    weights = next(iter(figures["cells"][0]["sides"].values()))["weights"] / 1e6
    memory = MEMORY[figures["device"] != "cpu"]
    return [
        f"Made by `benchmarks/torch_speed.py` in {figures['minutes']:.0f} minutes: {figures['machine']}, device "
        f"{figures['device']}, {figures['threads']} threads; {versions}. {figures['model']}, {figures['parameters'] / 1e6:,.0f} M "
        f"parameters in {figures['dtype']}. Our settings beside the same for all: {figures['options'] or 'the defaults'}.",
        "",
        fill(METHOD.format(share=SHARE, mix=figures["mix"], steps=figures["steps"], memory=memory, weights=weights), 132),
    ]


def _goal_lines(figures: Figures) -> list[str]:
    lines = []
    for side, one in figures["goals"].items():
        speed, memory, count = one["speed"], one["memory"], one["settings"]
        reached = speed["reached"] == memory["reached"] == count
        by_cpu = f", by CPU seconds in {one['speed_by_cpu']['reached']}" if figures["device"] == "cpu" else ""
        lines.append(
            f"- Beside {NAMES[side]}: at least {FASTER} times as fast in {speed['reached']} of {count} settings (least "
            f"{speed['worst']:.2f}{by_cpu}), at most {SMALLER} of the memory in {memory['reached']} of {count} (most "
            f"{memory['worst']:.2f}): {'both goals reached' if reached else 'goals not reached everywhere'}."
        )
    same = [f"**not the same: {what}**" for what in figures["unequal"]]
    return [*lines, *(f"- {one}" for one in same or ["All sides learned the same tokens with the same losses, as asserted."])]


SHAPE: dict[str, Column] = {
    "data": lambda one: one["kind"],
    "tokens": lambda one: f"{one['length']:,}",
    "batch": lambda one: f"{one['batch']} x {one['accumulation']}",
    "checkpointing": lambda one: "yes" if one["checkpoint"] else "no",
}


def _of(one: Figures, group: str, side: str, name: str, form: str) -> str:
    return _number(one[group].get(side, {}).get(name), form)


def _speed_columns(sides: Sequence[str], by_cpu: bool, utilisation: bool) -> dict[str, Column]:
    def columns(group: str, words: str, name: str, form: str, which: Sequence[str]) -> dict[str, Column]:
        return {f"{words}{NAMES[s]}": lambda one, s=s: _of(one, group, s, name, form) for s in which}  # type: ignore[misc]

    peers = [side for side in sides if side != "ours"]
    found = columns("sides", "a second: ", "learned_a_second", ",.1f", sides)
    found |= columns("beside", "times ", "times_faster", ".2f", peers)
    if by_cpu:
        found |= columns("beside", "by CPU seconds: times ", "times_faster_by_cpu", ".2f", peers)
        found |= columns("sides", "cores busy: ", "cores", ".1f", sides)
    if utilisation:
        found |= columns("sides", "share of the peak: ", "utilisation", ".1%", sides)
    return found | {"rounds": lambda one: "/".join(str(one["sides"][s]["repetitions"]) for s in sides if s in one["sides"])}


def _memory_columns(sides: Sequence[str]) -> dict[str, Column]:
    def gigabytes(one: Figures, side: str) -> str:
        return _number(one["sides"][side]["peak"] / 1e9 if side in one["sides"] else None, ".2f")

    peers = [side for side in sides if side != "ours"]
    found: dict[str, Column] = {f"GB: {NAMES[s]}": lambda one, s=s: gigabytes(one, s) for s in sides}  # type: ignore[misc]
    found |= {f"of {NAMES[s]}'s": lambda one, s=s: _of(one, "beside", s, "memory_ratio", ".2f") for s in peers}  # type: ignore[misc]
    found["learned"] = lambda one: f"{next(iter(one['sides'].values()))['learned']:,}"
    found |= {f"computed: {NAMES[s]}": lambda one, s=s: _of(one, "sides", s, "computed", ",") for s in sides}  # type: ignore[misc]
    return found | {"losses differ by": lambda one: f"{one['loss_difference']:.0e}"}


def _settings(settings: Mapping[str, Figures]) -> list[str]:
    """What each side was told, or has as its default; what differs from setting to setting is in the tables above."""
    sides = [side for side in NAMES if side in settings]
    names = dict.fromkeys(name for side in sides for name in settings[side] if name not in BY_SETTING)
    columns: dict[str, Column] = {"setting": lambda one: one["name"]}
    columns |= {NAMES[s]: lambda one, s=s: str(one.get(s, "")) for s in sides}  # type: ignore[misc]
    return _table(columns, ({"name": name} | {s: settings[s].get(name, "") for s in sides} for name in names))
