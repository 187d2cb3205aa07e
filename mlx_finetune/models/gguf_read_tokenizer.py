"""The tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_finetune.files import write_json
from mlx_finetune.models.gguf_pre import RULES, pre_tokenizer_steps

Metadata = Mapping[str, Any]

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # gguf.TokenType; the first two are matched whole, before the text is split
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def token_ids(metadata: Metadata) -> dict[str, int]:
    """The special ids that config.json and generation_config.json name."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}
    return {key: value for key, value in ids.items() if value is not None}


def write_tokenizer(metadata: Metadata, context: int, folder: Path) -> None:
    """Writes both files; byte-level BPE that splits by one of the known rules, and composes no characters, as llama.cpp."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    rule = metadata["tokenizer.ggml.pre"]
    vocabulary = {token: number for number, token in enumerate(tokens) if types[number] != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    empty = json.loads(Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=RULES[rule][1])).to_str())
    empty["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre_tokenizer_steps(rule)}
    tokenizer = Tokenizer.from_str(json.dumps(empty))
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL)])
    _surround(tokenizer, metadata, tokens, rule)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", _settings(metadata, tokens, context))


def _surround(tokenizer: Any, metadata: Metadata, tokens: list[str], rule: str) -> None:
    """What llama.cpp puts around each text; with this rule it puts the first where the file is silent."""
    from tokenizers import processors

    silent = {"bos": rule == "llama-bpe", "eos": False}
    named = {
        name: metadata[f"tokenizer.ggml.{name}_token_id"]
        for name, usual in silent.items()
        if metadata.get(f"tokenizer.ggml.add_{name}_token", usual) and f"tokenizer.ggml.{name}_token_id" in metadata
    }
    if named:
        texts = [*([tokens[named["bos"]]] if "bos" in named else []), "$A", *([tokens[named["eos"]]] if "eos" in named else [])]
        special = [(tokens[number], number) for number in named.values()]
        tokenizer.post_processor = processors.TemplateProcessing(single=texts, special_tokens=special)


def _settings(metadata: Metadata, tokens: list[str], context: int) -> dict[str, Any]:
    ids = {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in ROLES.items()}
    template = metadata.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **{key: tokens[number] for key, number in ids.items() if number is not None},
        **({"chat_template": template} if template else {}),
    }
