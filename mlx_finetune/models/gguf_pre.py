"""Which of llama.cpp's pre-tokenizers splits a text as a byte-level tokenizer does.

llama.cpp knows a splitting rule by name only, and a wrong name changes the tokens without a word. Its own converter knows
a tokenizer by the ids of one fixed text; here the rule itself is compared, so that a tokenizer of any vocabulary is known
and an unknown rule is refused. tests/test_gguf_tokens.py proves each rule in llama.cpp.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_finetune.errors import UserError

Step = tuple[Any, ...]

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3, QWEN2 = WORDS % "{1,3}", WORDS % ""
BYTES, BYTES_AND_WORDS = ("ByteLevel", False, False), ("ByteLevel", False, True)
# name -> the steps, and whether a word that is a token is taken whole whatever the merges say
RULES: Mapping[str, tuple[tuple[Step, ...], bool]] = {
    "gpt-2": ((BYTES_AND_WORDS,), False),
    "smollm": ((("Digits", True), BYTES_AND_WORDS), False),
    "llama-bpe": ((("Split", LLAMA3, "Isolated", False), BYTES), True),
    "qwen2": ((("Split", QWEN2, "Isolated", False), BYTES), False),
}
COMPOSED = ("qwen2",)  # these models compose characters first (NFC), which llama.cpp leaves out, as everybody's GGUF of them does
HINT = "serve the Hugging Face folder instead"


def pre_tokenizer_name(tokenizer: Mapping[str, Any], place: str) -> str:
    """llama.cpp's name for the splitting rule of a tokenizer.json; `place` says where it comes from.

    Raises:
        UserError: a rule that llama.cpp does not have, or that is not proven here.
    """
    steps = tuple(_steps(tokenizer.get("pre_tokenizer") or {}))
    whole = bool(tokenizer["model"].get("ignore_merges"))
    name = next((name for name, rule in RULES.items() if rule == (steps, whole)), None)
    normalizer = tokenizer.get("normalizer")
    if name is None or (normalizer and not (normalizer == {"type": "NFC"} and name in COMPOSED)):
        shown = ", ".join(str(step[0]) for step in steps) or "none"
        what = f"pre-tokenizer ({shown}{', ignore_merges' if whole else ''}) or normalizer"
        raise UserError(f"{place}: its {what} is none of {', '.join(RULES)}, and a guess would change the tokens", hint=HINT)
    return name


def pre_tokenizer_steps(name: str) -> list[dict[str, Any]]:
    """The steps of a rule as tokenizer.json has them."""
    return [_as_json(step) for step in RULES[name][0]]


def _steps(step: Mapping[str, Any]) -> Iterator[Step]:
    match step.get("type"):
        case "Sequence":
            for one in step["pretokenizers"]:
                yield from _steps(one)
        case "Digits":
            yield "Digits", step["individual_digits"]
        case "ByteLevel":
            yield "ByteLevel", step["add_prefix_space"], step["use_regex"]
        case "Split":
            pattern = step["pattern"]
            yield "Split", pattern.get("Regex", pattern), step["behavior"], step["invert"]
        case None:
            pass
        case other:
            yield (other,)


def _as_json(step: Step) -> dict[str, Any]:
    match step:
        case "Digits", individual:
            return {"type": "Digits", "individual_digits": individual}
        case "ByteLevel", prefix, words:
            return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": words}
        case "Split", pattern, behavior, invert:
            return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    raise AssertionError(step)
