"""The base, the tuned and the fused model run in float32, one at a time: in transformers and peft, or in MLX.

The tuned model is base + checkpoint as another library reads it, never the fused file, lest `fuse` be proven by itself.
"""

import gc
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.errors import REFUSALS, UserError, no_memory
from mlx_finetune.export.changes import is_full
from mlx_finetune.export.distance import Distance, Distances, Measured, VerificationError, distance, largest
from mlx_finetune.export.rows import HEAD_WEIGHT
from mlx_finetune.models.quiet import quietly
from mlx_finetune.models.weights import SINGLE

Tokens = Sequence[Sequence[int]]
Rows = list[list[int]]
Stored = Mapping[str, str]  # tensor -> dtype, of the changed tensors that are stored in less than float32


def in_transformers(model: Path, checkpoint: Path, fused: Path, tokens: Tokens, stored: Stored, answers: Sequence[int]) -> Measured:
    """Base + checkpoint: the adapter opened and merged by peft, or the trained weights put in by torch.

    `answers`: how many greedy tokens of the tuned model follow each row of `tokens`.
    """
    network, base_keys = load_transformers(model)
    tune = _train_transformers if is_full(checkpoint) else _open_in_peft
    network, rows, reference, from_base = tune(network, checkpoint, tokens, answers)
    _round_torch(network, stored)
    rounded = list(transformers_logits(network, rows))
    del network
    gc.collect()  # one model in memory at a time
    loaded, keys = load_transformers(fused)
    found = list(transformers_logits(loaded, rows))
    return Measured(distances_of(tokens, reference, rounded, found, from_base, lost_keys(keys, base_keys)), rows, reference, found)


def distances_of(
    tokens: Tokens,
    reference: list[np.ndarray],
    rounded: list[np.ndarray],
    found: list[np.ndarray],
    from_base: Distance,
    lost: tuple[list[str], list[str]],
) -> Distances:
    """Over the texts themselves; the answers behind them are for greedy tokens."""
    reference, rounded, found = (beginnings(logits, tokens) for logits in (reference, rounded, found))
    return Distances(
        base=from_base,
        rounded=distance(reference, rounded),
        fused=distance(reference, found),
        fused_to_rounded=distance(rounded, found),
        largest_logit=largest(reference),
        missing=lost[0],
        unexpected=lost[1],
    )


def beginnings(logits: list[np.ndarray], of: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
    """As many places of each as `of` has: a causal model's are the same whatever follows."""
    return [rows[: len(other)] for rows, other in zip(logits, of, strict=True)]


def lost_keys(keys: Mapping[str, set[str]], base: Mapping[str, set[str]]) -> tuple[list[str], list[str]]:
    """Tensors that were not there, or not of the right shape, so that transformers drew them anew; and those too many.

    Without those of the base, which are the same whatever was trained.
    """
    fresh = (keys["missing_keys"] | keys["mismatched_keys"]) - base["missing_keys"] - base["mismatched_keys"]
    return sorted(fresh), sorted(keys["unexpected_keys"] - base["unexpected_keys"])


def load_transformers(folder: Path, hint: str = "see that the base is complete") -> tuple[Any, dict[str, set[str]]]:
    """The model in float32, and names of tensors by what was wrong with them: missing_keys and others of transformers.

    Raises:
        UserError: transformers cannot load the folder.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers.utils import logging

    from mlx_finetune.engines.torch.load import auto_class

    logging.disable_progress_bar()
    try:
        with quietly():
            model, keys = auto_class(folder).from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ImportError, StrictDataclassError, *REFUSALS) as error:
        if no_memory(error):
            raise
        reason = (" ".join(str(error).split()) or type(error).__name__)[:160]
        raise UserError(f"{folder}: transformers cannot load it: {reason}", hint) from error
    named = {kind: {str(name[0] if isinstance(name, tuple) else name) for name in names} for kind, names in keys.items()}
    return model.eval(), {"mismatched_keys": set[str]()} | named


def transformers_logits(model: Any, tokens: Tokens) -> Iterator[np.ndarray]:
    """float32 [T, V] of each row."""
    import torch

    for row in tokens:
        with torch.inference_mode():
            yield model(torch.tensor([row])).logits[0].float().numpy()


def _answer_transformers(network: Any, tokens: Tokens, answers: Sequence[int]) -> Rows:
    """Each row and the greedy tokens behind it."""
    import torch

    rows = [list(row) for row in tokens]
    for row, count in zip(rows, answers, strict=True):
        cache, fresh = None, row
        for _ in range(count):
            with torch.inference_mode():
                answer = network(torch.tensor([fresh]), past_key_values=cache, use_cache=True)
            row.append(int(answer.logits[0, -1].argmax()))
            cache = getattr(answer, "past_key_values", None)
            fresh = row if cache is None else row[-1:]
    return rows


def _open_in_peft(
    network: Any, checkpoint: Path, tokens: Tokens, answers: Sequence[int]
) -> tuple[Any, Rows, list[np.ndarray], Distance]:
    """The merged network, `tokens` with their answers, the logits before it was merged, and their distance to the base's."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for names that it is about to change
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # see `_merge`
        warnings.filterwarnings("ignore", ".*rank_pattern")  # of parameters, which it looks for among modules
        tuned = PeftModel.from_pretrained(network, checkpoint).eval()
        rows = _answer_transformers(tuned, tokens, answers)
        reference = list(transformers_logits(tuned, rows))
        with tuned.disable_adapter():
            from_base = distance(beginnings(reference, tokens), transformers_logits(tuned, tokens))
        return _merge(tuned), rows, reference, from_base


def _merge(tuned: Any) -> Any:
    """peft 0.21 adds to a weight that embeddings and head share what it finds on either: the same change twice."""
    network = tuned.get_base_model()
    embeddings, head = network.get_input_embeddings(), network.get_output_embeddings()
    if hasattr(head, "base_layer") and head.weight is embeddings.weight:
        network.set_output_embeddings(head.base_layer)
    return tuned.merge_and_unload()


def _train_transformers(
    network: Any, checkpoint: Path, tokens: Tokens, answers: Sequence[int]
) -> tuple[Any, Rows, list[np.ndarray], Distance]:
    """The network with the trained weights in it, as `_open_in_peft`; the base is looked at without the answers."""
    from safetensors import safe_open

    base = list(transformers_logits(network, tokens))
    with safe_open(checkpoint / SINGLE, "pt") as file:
        for name in sorted(file.keys()):
            _torch_weight(network, name).copy_(file.get_tensor(name))
    rows = _answer_transformers(network, tokens, answers)
    reference = list(transformers_logits(network, rows))
    return network, rows, reference, distance(beginnings(reference, tokens), base)


def _round_torch(network: Any, stored: Stored) -> None:
    """The weights as the fused folder must store them, rounded by torch."""
    import torch

    kinds = {"BF16": torch.bfloat16, "F16": torch.float16}
    weights = dict(network.named_parameters(remove_duplicate=False))
    for name, dtype in rounded_as(stored, {name: weight.ndim for name, weight in weights.items()}).items():
        weights[name].data.copy_(weights[name].data.to(kinds[dtype]))


def rounded_as(stored: Stored, dimensions: Mapping[str, int]) -> dict[str, str]:
    """The dtype to which each weight of a loaded network is rounded; `dimensions`: of all of them, by the network's names.

    Where the files call a changed tensor otherwise, as experts and models that see have it, all matrices are rounded to its
    dtype: those that did not change are of that dtype already, and stay as they are.

    Raises:
        VerificationError: such tensors have several dtypes.
    """
    found = {name: dtype for name, dtype in stored.items() if name in dimensions}
    others = {dtype for name, dtype in stored.items() if name not in dimensions and name != HEAD_WEIGHT}
    if len(others) > 1:
        raise VerificationError(f"changed tensors of {', '.join(sorted(others))} have no counterpart to compare")
    every = others.pop() if others else None
    return found | {name: every for name, count in dimensions.items() if every and count > 1 and name not in found}


def _torch_weight(network: Any, name: str) -> Any:
    weights = dict(network.named_parameters(remove_duplicate=False))
    if name not in weights:
        raise VerificationError(f"{name}: transformers has no weight of this name to compare")
    return weights[name].data
