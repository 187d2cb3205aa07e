"""What `prepare` made, as a person reads it."""

from typing import Any

from mlx_finetune.terminal import table

COUNTS = {
    "examples": "examples",
    "tokens": "tokens",
    "learned_tokens": "learned tokens",
    "learned_turns": "learned turns",
    "turns_of_own_context": "examples with a context of their own for one turn",
    "tokens_of_own_contexts": "  and their tokens",
    "turns_behind_control_text": "turns after the name of a control token, kept as text",
    "placeholder_tokens": "tokens in place of secrets, not learned",
    "turns_too_long": "turns too long for a window, not learned",
    "messages_shortened": "long messages shortened where only read",
    "windows_with_short_prompt": "windows with a part of the system prompt only",
    "messages_left_out": "messages only read that no window had room for",
}
SHARES = {
    "exact_turns": ("learned_turns", "turns after exactly the tokens that are served"),
    "exact_in_one_rendering": ("learned_turns", "  if each window were rendered once"),
    "served_as_trained": ("learned_turns", "turns that saw all that came before them"),
    "turn_tokens_learned": ("turn_tokens", "the assistant's tokens that are learned"),
    "turn_tokens_by_truncation": ("turn_tokens", "  if conversations were cut off at the end of a window"),
}


def show_dataset(info: dict[str, Any]) -> None:
    """What became of the conversations, as a table; what there is none of is not in it."""
    splits = {"training": info["train"], "held out": info["valid"]} | ({"test": info["test"]} if info["examples"]["test"] else {})
    rows = [("conversations", *(f"{sum(each['conversations'].values()):,}" for each in splits.values()))]
    for source in info["train"]["learned_tokens_by_source"]:
        counts = (each["learned_tokens_by_source"].get(source, 0) for each in splits.values())
        rows.append((f"learned tokens of {source}", *(f"{count:,}" for count in counts)))
    for name, text in COUNTS.items():
        if any(each[name] for each in splits.values()):
            rows.append((text, *(f"{each[name]:,}" for each in splits.values())))
    for name, (whole, text) in SHARES.items():
        rows.append((text, *(_share(each[name], each[whole]) for each in splits.values())))
    table("prepared", rows, ("", *splits))
    for each in splits.values():
        for reason, count in each["turns_refused"].items():
            if count:
                print(f"not learned: {count} turns ({reason})")
        for reason, count in each["turns_inexact"].items():
            print(f"learned in another context than is served: {count} turns ({reason})")
    for reason, count in info["left_out"].items():
        print(f"left out: {count} conversations ({reason})")
    if any(each["windows_with_short_prompt"] for each in splits.values()):
        print("a part of the system prompt only: collect --system short has one that fits whole, and that gptme serves")
    if line := _share_line(info):
        print(line)
    if not info["examples"]["valid"]:
        print("nothing is held out: that takes two or more conversations and a valid_fraction")


def _share(part: int, whole: int) -> str:
    return f"{1000 * part // whole / 10} %" if whole else "-"  # rounded down: 100 % is all of it


def _share_line(info: dict[str, Any]) -> str:
    """How much of OpenAssistant there is, and why not as much as was asked; empty where none was to be had."""
    asked, reached = 100 * info["openassistant_share"], 100 * info["openassistant_share_reached"]
    line = f"OpenAssistant: {reached:.1f} % of the learned tokens" if reached else ""
    if not line or asked - reached < 0.1:
        return line
    why = "all there is was taken" if info["openassistant_all_taken"] else "the next would go beyond"
    return f"{line}, asked {asked:g} %: {why}"
