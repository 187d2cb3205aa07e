"""What of a fused folder must be the base's to the last byte, and what the base's settings promise: no model is loaded."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_finetune.data.policies import policy_of
from mlx_finetune.export.probes import vocabulary_of
from mlx_finetune.export.rows import original, tied_twins
from mlx_finetune.files import read_json
from mlx_finetune.models.quiet import quietly
from mlx_finetune.models.weights import TensorLocation, tensor_headers

# Besides tokenizer_config.json, which a chat template of the run's own may take its template out of.
TOKENIZER_FILES = (
    "tokenizer.json tokenizer.model vocab.json vocab.txt merges.txt special_tokens_map.json added_tokens.json spiece.model".split()
)
TOKENIZER_CONFIG, GENERATION, TEMPLATE = "tokenizer_config.json", "generation_config.json", "chat_template.jinja"
BLOCK = 1 << 23  # bytes compared at once


@dataclass(frozen=True)
class FolderChecks:
    """What was compared and what was found wrong.

    changed, unchanged: tensors that were to change, and those whose bytes are the base's.
    tokenizer_files: those that are the base's byte for byte. special_tokens: ids by role, the base's.
    template: sha256 of the chat template, whether it is the one that was trained, and what it does to roles.
    remarks: what is odd, and is so with the base. problems: a line each; none where all is as it must be.
    """

    changed: int
    unchanged: int
    tokenizer_files: list[str]
    special_tokens: dict[str, list[int]]
    template: dict[str, str | bool]
    remarks: list[str]
    problems: list[str]


def check_folder(model: Path, fused: Path, changed: Collection[str], template: str = "") -> FolderChecks:
    """Compares the folder `fused` with its base; `template`: the chat template that was trained, the base's where empty."""
    problems: list[str] = []
    same, differing = _compare_tensors(model, fused, changed)
    problems += [f"{name} is not the base's, and was not trained" for name in differing]
    problems += _parted_twins(model, fused)
    files, wrong = _compare_tokenizers(model, fused)
    problems += [f"{name} is not the base's" for name in wrong]
    if _read(model / GENERATION) != _read(fused / GENERATION):
        problems.append(f"{GENERATION} is not the base's")
    tokens, other, remarks = _special_tokens(model, fused)
    problems += other
    own, expected = own_template(fused), template or own_template(model)
    if own != expected:
        problems.append("the chat template is not the one that was trained")
    about: dict[str, str | bool] = {
        "sha256": hashlib.sha256(own.encode()).hexdigest(),
        "as_trained": own == expected,
        "role_policy": policy_of(own) or "as the model's own template has them",
    }
    return FolderChecks(len(changed), same, files, tokens, about, remarks, problems)


def own_template(folder: Path) -> str:
    """The chat template of a model folder as transformers finds it; empty where there is none, or several under names."""
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_bytes().decode()
    found = _settings(folder).get("chat_template")
    return found if isinstance(found, str) else ""


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG
    settings = read_json(path) if path.is_file() else {}
    return settings if isinstance(settings, dict) else {}


def _compare_tensors(model: Path, fused: Path, changed: Collection[str]) -> tuple[int, list[str]]:
    """How many tensors that were not to change have the base's bytes, and which have others; missing ones are told elsewhere."""
    base, found = tensor_headers(model), tensor_headers(fused)
    kept = [name for name in base if name in found and name not in changed]
    differing = [name for name in kept if not _same(base[name], found[name])]
    differing += [name for name in changed if name in found and name in base and _form(base[name]) != _form(found[name])]
    return len(kept) - len([name for name in differing if name not in changed]), differing


def _parted_twins(model: Path, fused: Path) -> list[str]:
    """Of embeddings and head that share a weight, stored twice and alike in the base: a line where they are not alike any more."""
    base, is_tied = original(model)
    twins = tied_twins(base, is_tied)
    if twins is None or not _same(*(base[name] for name in twins)):
        return []
    found = tensor_headers(fused)
    if all(name in found for name in twins) and _same(*(found[name] for name in twins)):
        return []
    return [f"{' and '.join(twins)} are one weight, and are not the same"]


def _form(location: TensorLocation) -> tuple[str, tuple[int, ...]]:
    return location.dtype, location.shape


def _same(one: TensorLocation, other: TensorLocation) -> bool:
    if _form(one) != _form(other):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        left = one.end - one.start
        while left:
            count = min(BLOCK, left)
            if first.read(count) != second.read(count):
                return False
            left -= count
    return True


def _compare_tokenizers(model: Path, fused: Path) -> tuple[list[str], list[str]]:
    """Files that are the same byte for byte, and those that are not; the chat template is looked at by itself."""
    names = [name for name in TOKENIZER_FILES if (model / name).is_file() or (fused / name).is_file()]
    same = [name for name in names if _read(model / name) == _read(fused / name)]
    wrong = [name for name in names if name not in same]
    if _read(model / TOKENIZER_CONFIG) == _read(fused / TOKENIZER_CONFIG):
        same += [TOKENIZER_CONFIG] if (model / TOKENIZER_CONFIG).is_file() else []
    elif _without_template(_settings(model)) != _without_template(_settings(fused)):
        wrong.append(TOKENIZER_CONFIG)
    return same, wrong


def _without_template(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "chat_template"}


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _special_tokens(model: Path, fused: Path) -> tuple[dict[str, list[int]], list[str], list[str]]:
    """Ids of the end of a turn and of padding, what is wrong with them, and what is so with the base too."""
    before, after, size = _ids(model), _ids(fused), vocabulary_of(fused)
    problems = [f"{name} {after[name]} is not the base's {before[name]}" for name in after if after[name] != before[name]]
    beyond = {(name, i): f"{name} {i} is not in the vocabulary of {size}" for name in after for i in after[name] if i >= size}
    problems += [text for (name, i), text in beyond.items() if i not in before[name]]
    return after, problems, [text for (name, i), text in beyond.items() if i in before[name]]


def _ids(folder: Path) -> dict[str, list[int]]:
    from transformers import AutoTokenizer

    with quietly():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else read_json(folder / "config.json")
    ends = generation.get("eos_token_id")
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    return {"end of turn": sorted(stops), "padding": [] if tokenizer.pad_token_id is None else [tokenizer.pad_token_id]}
