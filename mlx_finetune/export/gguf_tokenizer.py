"""A tokenizer in GGUF: the very one that transformers trained with, token by token, or a refusal.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#ggml
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_finetune.errors import UserError
from mlx_finetune.export.gguf_pieces import is_byte, is_of_pieces, is_whole, prepends_blank, scores_of
from mlx_finetune.files import read_json
from mlx_finetune.models.gguf_pre import HINT, pre_tokenizer_name

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
# Ends of turns that llama.cpp finds by their text (llama-vocab.cpp); others it must be told.
KNOWN_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>",
    "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
)  # fmt: skip
LOOKS_SPECIAL = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
PHI3_PLAIN = {"<unk>", "<s>", "<|endoftext|>"}  # of Phi-3's tokens those that take no blanks; llama-vocab.cpp
PADS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def write_tokenizer(writer: Any, model: Path, vocabulary: int) -> tuple[str, bool]:
    """Writes tokens, types, merges, special ids and chat template into gguf's `writer`.

    Returns the pre-tokenizer's name, and whether the tokens take the blanks behind them as those of Phi-3 do.

    `vocabulary`: rows of the embeddings; those that no token has become unused ones.

    Raises:
        UserError: no tokenizer, one of another kind, or one that llama.cpp would follow otherwise.
    """
    loaded = _load(model)
    tokenizer = json.loads(loaded.backend_tokenizer.to_str())
    takes_blanks = _takes_blanks(tokenizer, model)
    tokens, types = _tokens(tokenizer, vocabulary, model)
    if is_of_pieces(tokenizer):
        pre = _write_pieces(writer, tokenizer, loaded, model, tokens)
    elif tokenizer["model"]["type"] == "BPE" and "ByteLevel" in json.dumps(tokenizer.get("decoder")):
        pre = _write_merges(writer, tokenizer, model, tokens)
    else:
        raise UserError(f"{model}: its tokenizer is {tokenizer['model']['type']}, neither of bytes nor of SentencePiece", hint=HINT)
    writer.add_token_types(types)
    _write_special(writer, loaded, model, tokens)
    return pre, takes_blanks


def _takes_blanks(tokenizer: Mapping[str, Any], model: Path) -> bool:
    """Whether tokens take the blanks behind them. llama.cpp knows that of Phi-3 alone: by its name, and of which tokens.

    Raises:
        UserError: tokens that take other blanks.
    """
    added = tokenizer["added_tokens"]
    taking = {token["content"] for token in added if token["lstrip"] or token["rstrip"] or token["single_word"]}
    if not taking:
        return False
    known = {token["content"] for token in added}
    like_phi3 = {"</s>", *PHI3_PLAIN} <= known and all(not (token["lstrip"] or token["single_word"]) for token in added)
    if not like_phi3 or taking != known - PHI3_PLAIN:
        raise UserError(f"{model}: token {min(taking)!r} takes blanks beside it, llama.cpp's does not", hint=HINT)
    return True


def _write_merges(writer: Any, tokenizer: Mapping[str, Any], model: Path, tokens: list[str]) -> str:
    pre = pre_tokenizer_name(tokenizer, str(model))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]])
    return pre


def _write_pieces(writer: Any, tokenizer: Mapping[str, Any], loaded: Any, model: Path, tokens: list[str]) -> str:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores_of(tokenizer, tokens, str(model)))
    writer.add_add_space_prefix(prepends_blank(tokenizer, loaded, model))
    return "default"


def leading_token(model: Path) -> str:
    """The text of the token that llama.cpp puts in front of every text of this model; empty where it puts none."""
    loaded = _load(model)
    return str(loaded.bos_token) if _around(loaded, model)[0] else ""


def _load(model: Path) -> Any:
    from transformers import AutoTokenizer

    path = model / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{model}: no tokenizer.json", hint="use a model with a tokenizer.json")
    stored = read_json(path)
    if not isinstance(stored, dict) or not isinstance(stored.get("model"), dict) or not stored["model"].get("vocab"):
        raise UserError(f"{path}: no vocabulary", hint="use a model with a whole tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{model}: tokenizer cannot be read: {reason}", hint="use a model with a whole tokenizer.json") from error
    if not tokenizer.is_fast:
        raise UserError(f"{model}: only a slow tokenizer", hint="use a model with a tokenizer.json")
    return tokenizer


def _tokens(tokenizer: Mapping[str, Any], vocabulary: int, model: Path) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embeddings."""
    pieces = is_of_pieces(tokenizer)
    texts = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    kinds = {number: BYTE if pieces and is_byte(text) else NORMAL for number, text in texts.items()}
    for token in tokenizer["added_tokens"]:
        number, text = token["id"], token["content"]
        kinds[number] = CONTROL if token["special"] or _looks_special(text) else USER_DEFINED
        if pieces and not is_whole(token) and number in texts:
            kinds[number] = NORMAL
        texts[number] = text
    if pieces and (unknown := tokenizer["model"].get("unk_token")):
        kinds[tokenizer["model"]["vocab"][unknown]] = UNKNOWN
    # Gemma's has a token for pictures behind the last row of a model that sees none: it is never met.
    beyond = {number for number in texts if number >= vocabulary} - {token["id"] for token in tokenizer["added_tokens"]}
    if beyond:
        where = f"token {texts[max(beyond)]!r} has the id {max(beyond)}"
        raise UserError(f"{model}: {where}, the embeddings only {vocabulary} rows", hint="use the tokenizer of this model")
    numbers = range(vocabulary)
    return [texts.get(n, f"[PAD{n}]") for n in numbers], [kinds.get(n, UNUSED) for n in numbers]


def _looks_special(text: str) -> bool:
    """Some models do not mark as special what is; llama.cpp's converter goes by the text, and so do all published files."""
    return text in PADS or any(text.startswith(start) and text.endswith(end) for start, end in LOOKS_SPECIAL)


def _write_special(writer: Any, loaded: Any, model: Path, tokens: list[str]) -> None:
    for role in ROLES:
        number = getattr(loaded, f"{role}_token_id")
        if number is not None and number >= len(tokens):
            what = f"its {role} token has the id {number}"
            raise UserError(f"{model}: {what}, the embeddings only {len(tokens)} rows", hint="use the tokenizer of this model")
        if number is not None:
            getattr(writer, f"add_{role}_token_id")(number)
    first, last = _around(loaded, model)
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)
    for name, number in zip(("eot", "eom"), _other_ends(loaded, model, tokens), strict=False):
        getattr(writer, f"add_{name}_token_id")(number)
    if loaded.chat_template:
        writer.add_chat_template(_templates(loaded.chat_template))


def _around(loaded: Any, model: Path) -> tuple[bool, bool]:
    """Whether a text gets the first token in front of it, and the last behind it."""
    plain, whole = (loaded("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for first in (False, True):
        for last in (False, True):
            if whole == [loaded.bos_token_id] * first + plain + [loaded.eos_token_id] * last:
                return first, last
    raise UserError(f"{model}: its tokenizer puts tokens around a text that are not bos and eos", hint=HINT)


def _other_ends(loaded: Any, model: Path, tokens: list[str]) -> Iterator[int]:
    """Where generation_config.json stops besides eos, as far as llama.cpp does not know by itself; it takes two."""
    path = model / "generation_config.json"
    settings = read_json(path) if path.exists() else {}
    ends = settings.get("eos_token_id") if isinstance(settings, dict) else None
    others = [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int) and end != loaded.eos_token_id]
    if any(not 0 <= end < len(tokens) for end in others):
        raise UserError(f"{path}: eos_token_id {max(others)} is no token", hint="use the file of this model")
    unknown = [end for end in others if tokens[end] not in KNOWN_ENDS]
    if len(unknown) > 2:
        raise UserError(f"{path}: {len(unknown)} ends of turns that llama.cpp does not know", hint="keep two of eos_token_id")
    yield from unknown


def _templates(template: Any) -> Any:
    """One template, or llama.cpp's list of named ones."""
    return [{"name": name, "template": text} for name, text in template.items()] if isinstance(template, dict) else template
