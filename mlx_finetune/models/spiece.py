"""A SentencePiece model as the `tokenizer.json` that every library of today reads; no code that comes with a model is run.

Unigram (Kudo 2018) alone: normalisation, pieces and scores are those of the file, so that ids are sentencepiece's own.
"""

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_file, read_json, write_json
from mlx_finetune.models.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
    read_sentencepiece,
)

SPACE = "▁"  # U+2581, which stands for a blank in pieces
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
MORE = "additional_special_tokens"
# What of a tokenizer_config.json stays; whatever names classes or code does not.
KEPT = ("model_max_length", "padding_side", "truncation_side", "chat_template")
TEMPLATE = Path(__file__).with_name("instruction_template.jinja")
OTHER = "use a checkpoint that comes with a tokenizer.json"


def spiece_to_tokenizer(model_file: Path, folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` of a SentencePiece model to `folder`.

    Special and added tokens are those that tokenizer_config.json, special_tokens_map.json and added_tokens.json beside
    `model_file` name, else the model itself; an added one that has no embedding by config.json's vocab_size is left out.
    An MPT without a chat template gets one of instructions and responses: see instruction_template.jinja.

    Raises:
        UserError: a file that is broken; BPE and what else cannot be written so that ids stay the same; a token without an id.
    """
    model = read_sentencepiece(model_file)
    _check(model, model_file)
    beside = model_file.parent
    config = _object(beside / "tokenizer_config.json")
    roles, more = _special({**model.roles, **_object(beside / "special_tokens_map.json"), **config})
    added, without = _with_embeddings(_added(beside, config, len(model.pieces)), len(model.pieces), beside)
    roles = {role: name for role, name in roles.items() if name not in without}
    more = [name for name in more if name not in without]
    known = {*(piece.text for piece in model.pieces), *added}
    if unknown := [name for name in (*roles.values(), *more) if name not in known]:
        what = f"special token {unknown[0]!r} is neither in {model_file.name} nor in added_tokens.json"
        raise UserError(f"{beside}: {what}", hint="download what is missing, or mend tokenizer_config.json")
    control = [model.pieces[number].text for number in model.ids(CONTROL, UNKNOWN)]
    special = list(dict.fromkeys([*control, *roles.values(), *more]))
    with atomic_file(folder / "tokenizer.json") as file:
        json.dump(_tokenizer(model, special, added), file, ensure_ascii=False, indent=1)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    settings |= {MORE: more} if more else {}
    settings |= {key: config[key] for key in KEPT if key in config}
    if "chat_template" not in config and not (beside / "chat_template.jinja").is_file() and _is_mpt(beside):
        settings["chat_template"] = TEMPLATE.read_text(encoding="utf-8").rstrip("\n")
    write_json(folder / "tokenizer_config.json", settings)


def _check(model: SentencePieceModel, file: Path) -> None:
    """Raises UserError, by name, for what `tokenizers` would do otherwise than sentencepiece."""
    refused = {
        f"{model.algorithm} and not Unigram": model.algorithm != "Unigram",
        "blanks behind words (treat_whitespace_as_suffix)": model.whitespace_as_suffix,
        "rules of its own for decoding (denormalizer_spec)": model.denormalises,
        f"{len(model.ids(UNKNOWN))} pieces for what is unknown": len(model.ids(UNKNOWN)) != 1,
        "pieces that are not used (UNUSED)": bool(model.ids(UNUSED)),
        "byte_fallback without the 256 bytes": model.byte_fallback and len(model.ids(BYTE)) != 256,
        "bytes without byte_fallback": bool(model.ids(BYTE)) and not model.byte_fallback,
        "a piece twice": len({piece.text for piece in model.pieces}) < len(model.pieces),
        "no pieces of text": not model.ids(NORMAL),
        "symbols of the user's that its rules change": any(_changed(model, number) for number in model.ids(USER_DEFINED)),
        "scores above 0": any(model.pieces[number].score > 0 for number in model.ids(NORMAL)),
    }
    for what in (what for what, found in refused.items() if found):
        raise UserError(f"{file}: a SentencePiece model with {what} is not read here", hint=OTHER)


def _changed(model: SentencePieceModel, number: int) -> bool:
    """Whether the rules of normalisation, from which sentencepiece keeps symbols of the user's, would change one."""
    from tokenizers.normalizers import Precompiled

    text = model.pieces[number].text
    return bool(model.charsmap) and str(Precompiled(model.charsmap).normalize_str(text)) != text


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object", hint="download it again")
    return found


def _special(config: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The tokens of each role, and those of none."""
    roles = {role: _content(config[role]) for role in ROLES if config.get(role)}
    more = config.get(MORE) or []
    return roles, [_content(token) for token in (more if isinstance(more, list) else [])]


def _content(token: Any) -> str:
    """Of a token that is written as text, or as transformers' AddedToken."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise UserError(f"special token {str(token)[:80]!r} is no text", hint="mend tokenizer_config.json")
    return content


def _added(beside: Path, config: Mapping[str, Any], size: int) -> list[str]:
    """Tokens behind the vocabulary of the model, in the order of their ids."""
    found = dict(_object(beside / "added_tokens.json"))
    decoder = config.get("added_tokens_decoder") or {}
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        found[_content(token)] = int(number) if str(number).isdecimal() else -1
    behind = sorted((number, name) for name, number in found.items() if isinstance(number, int) and number >= size)
    if [number for number, _ in behind] != list(range(size, size + len(behind))):
        place = f"{behind[0][1]!r} has the id {behind[0][0]}"
        raise UserError(f"{beside}: added tokens do not follow each other from id {size}: {place}", hint=OTHER)
    return [name for _, name in behind]


def _with_embeddings(added: list[str], size: int, beside: Path) -> tuple[list[str], list[str]]:
    """Added tokens behind a vocabulary of `size` that have a row in the embeddings, and those that have none."""
    rows = _object(beside / "config.json").get("vocab_size")
    kept = max(rows - size, 0) if isinstance(rows, int) else len(added)
    return added[:kept], added[kept:]


def _is_mpt(folder: Path) -> bool:
    return _object(folder / "config.json").get("model_type") == "mpt"


def _tokenizer(model: SentencePieceModel, special: list[str], added: list[str]) -> dict[str, Any]:
    """tokenizer.json."""
    numbers = {piece.text: number for number, piece in enumerate(model.pieces)}
    numbers |= {name: len(numbers) + place for place, name in enumerate(added)}
    tokens = sorted({*special, *added}, key=lambda name: numbers[name])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": numbers[name], "content": name, **flags, "special": name in special} for name in tokens],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
        "pre_tokenizer": _apart(model, special),
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": _decoders(model)},
        "model": {
            "type": "Unigram",
            "unk_id": model.ids(UNKNOWN)[0],
            "vocab": _scores(model),
            "byte_fallback": model.byte_fallback,
        },
    }


def _normalizers(model: SentencePieceModel) -> list[dict[str, Any]]:
    """normalizer.cc: rules, then blanks, then the blank in front."""
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode()})
    if model.remove_extra_whitespaces:
        steps += [_replaced({"Regex": r"\A +| +\z"}, ""), _replaced({"Regex": " {2,}"}, " ")]
    if model.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": " "})
    return steps + ([_replaced({"String": " "}, SPACE)] if model.escape_whitespaces else [])


def _replaced(pattern: Mapping[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _apart(model: SentencePieceModel, special: list[str]) -> dict[str, Any] | None:
    """A special token that stands in a text as a text is cut in two.

    sentencepiece never takes it for the token; `tokenizers` would, for it looks texts up in the whole vocabulary.
    """
    texts = [model.pieces[number].text for number in model.ids(NORMAL, USER_DEFINED)]
    names = [name.replace(" ", SPACE) if model.escape_whitespaces else name for name in special]
    whole = [_cut(name, texts) for name in names if len(name) > 1]
    whole += ["<(?=0x[0-9A-F]{2}>)"] if model.byte_fallback else []
    if not whole:
        return None
    return {"type": "Split", "pattern": {"Regex": "|".join(whole)}, "behavior": "MergedWithPrevious", "invert": False}


def _cut(name: str, texts: list[str]) -> str:
    """A pattern for the character behind which `name` is cut: where the fewest pieces, best none, could reach over the cut."""
    places = range(1, len(name))
    best = min(places, key=lambda place: sum(name[place - 1 : place + 1] in text for text in texts))
    before = f"(?<={re.escape(name[: best - 1])})" if best > 1 else ""
    return f"{before}{re.escape(name[best - 1])}(?={re.escape(name[best:])})"


def _decoders(model: SentencePieceModel) -> list[dict[str, Any]]:
    steps = [_replaced({"String": SPACE}, " ")] if model.escape_whitespaces else []
    steps += [{"type": "ByteFallback"}] if model.byte_fallback else []
    steps.append({"type": "Fuse"})
    return steps + ([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if model.add_dummy_prefix else [])


def _scores(model: SentencePieceModel) -> list[tuple[str, float]]:
    """Symbols of the user's have 0.1 for each of their bytes but one, as sentencepiece 0.2.3 weighs them, and not their score."""
    return [
        (piece.text, 0.1 * (len(piece.text.encode()) - 1) if piece.kind == USER_DEFINED else piece.score) for piece in model.pieces
    ]
