"""Tokenizers of SentencePiece's kind (Llama 2, Mistral, Gemma, Phi-3) in GGUF: llama.cpp merges by scores, not by ranks.

transformers keeps such a tokenizer as BPE with byte fallback, its merges in the order of SentencePiece's scores. llama.cpp
joins whichever neighbours make the token of the highest score (llama-vocab.cpp, `llm_tokenizer_spm_session`). The two agree
where every way to make a token is a merge, and the ways of one token stand together; both are checked.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.probing import GPTME
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError
from mlx_finetune.models.gguf_pre import HINT

BLANK = "\u2581"  # SentencePiece's, for a space
ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": BLANK}, ESCAPE]}
ON_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}  # none are left
CONTENTS = ("Run it.", " a leading blank", "\n\n    indented:\n\treturn 1", "naïve 你好 🙂", "```\nls\n```", "  ")


def is_of_pieces(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is of this kind: BPE that falls back to bytes."""
    return tokenizer["model"]["type"] == "BPE" and bool(tokenizer["model"].get("byte_fallback"))


def is_byte(text: str) -> bool:
    """<0x00> to <0xFF>: what a character becomes that has no token."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def scores_of(tokenizer: Mapping[str, Any], texts: list[str], place: str) -> list[float]:
    """A score for each token, the higher the earlier it is merged.

    Raises:
        UserError: no order of scores merges as this tokenizer does.
    """
    model = tokenizer["model"]
    vocabulary: dict[str, int] = model["vocab"]
    if missing := [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]:
        raise UserError(f"{place}: its tokenizer has no token {missing[0]}", hint=HINT)
    if model.get("ignore_merges") or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise UserError(f"{place}: its tokenizer does not merge as SentencePiece does", hint=HINT)
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    made = [left + right for left, right in merges]
    order = list(dict.fromkeys(made))
    whole = {token["content"] for token in tokenizer["added_tokens"] if is_whole(token)}
    why = "" if [text for text, _ in groupby(made)] == order else "its merges do not stand in the order of tokens"
    for left, right in _ways(vocabulary, whole) - set(merges):
        why = f"{left!r} and {right!r} make a token and no merge"
    if why:
        raise UserError(f"{place}: its tokenizer merges otherwise than SentencePiece: {why}", hint=HINT)
    score = {text: -float(number) for number, text in enumerate(order)}
    return [score.get(text, -float(len(order)) if text in vocabulary and text not in whole else 0.0) for text in texts]


def is_whole(token: Mapping[str, Any]) -> bool:
    """Whether an added token is found before a text is merged; one with SentencePiece's blanks never is, for texts have others."""
    return bool(token["special"]) or BLANK not in token["content"]


def _ways(vocabulary: Mapping[str, int], whole: set[str]) -> set[tuple[str, str]]:
    """All pairs of tokens that together are one."""
    usual = vocabulary.keys() - whole
    cuts = ((text[:cut], text[cut:]) for text in usual if not is_byte(text) for cut in range(1, len(text)))
    return {(left, right) for left, right in cuts if left in usual and right in usual}


def prepends_blank(tokenizer: Mapping[str, Any], loaded: Any, model: Path) -> bool:
    """Whether llama.cpp shall put a blank before each text that begins or follows a control token.

    transformers 5 puts it at the very beginning only; then chats decide, of which llama.cpp's tokens have to be the same.

    Raises:
        UserError: neither gives the tokens that the model learned.
    """
    normalizer, pre = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    if normalizer == PREPEND and pre is None:
        return True
    if normalizer == ESCAPE and pre in (None, ON_SPACES):
        return False
    if normalizer is None and pre and pre.get("type") == "Metaspace" and pre.get("replacement") == BLANK and not pre.get("split"):
        texts = list(_texts(loaded, model))
        expected = _ids(tokenizer, texts)
        for prepends, other in ((False, ESCAPE), (True, PREPEND)):
            if _ids(dict(tokenizer) | {"normalizer": other, "pre_tokenizer": None}, texts) == expected:
                return prepends
    shown = json.dumps([normalizer, pre])[:120]
    raise UserError(f"{model}: its tokenizer treats blanks otherwise than llama.cpp: {shown}", hint=HINT)


def _texts(loaded: Any, model: Path) -> Iterator[str]:
    """Chats as the model's template writes them; without a template plain texts."""
    if not loaded.chat_template:
        yield from (content for content in CONTENTS if not content.startswith(" "))
        return
    template = ChatTemplate.load(model)
    for length in (4, 6, 8):
        yield template.render(GPTME[:length], True)
    for content in CONTENTS:
        chat = (Message("user", content), Message("assistant", content.strip() or "ok"), Message("user", content))
        yield template.render(chat, True)


def _ids(tokenizer: Mapping[str, Any], texts: list[str]) -> list[list[int]]:
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(json.dumps(dict(tokenizer) | {"post_processor": None}))
    return [list(encoder.encode(text, add_special_tokens=False).ids) for text in texts]
