"""The base, the tuned and the fused model run in float32, one at a time: in transformers and peft, or in MLX.

The tuned model is base + checkpoint as another library reads it, never the fused file, lest `fuse` be proven by itself.
"""

import gc
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.engines.adapter import EMBEDDING_A, EMBEDDING_B, LORA_A, LORA_B, MAGNITUDE, PEFT_PREFIX
from mlx_finetune.export.adapter import CONFIG, TENSORS
from mlx_finetune.export.changes import HEAD_WEIGHT, is_full
from mlx_finetune.export.distance import Distance, Distances, Measured, VerificationError, distance, largest
from mlx_finetune.files import read_json
from mlx_finetune.models.weights import SINGLE, tensor_headers

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
    return Measured(_distances(tokens, reference, rounded, found, from_base, _lost(keys, base_keys)), rows, reference, found)


def _distances(
    tokens: Tokens,
    reference: list[np.ndarray],
    rounded: list[np.ndarray],
    found: list[np.ndarray],
    from_base: Distance,
    lost: tuple[list[str], list[str]],
) -> Distances:
    """Over the texts themselves; the answers behind them are for greedy tokens."""
    reference, rounded, found = (_beginnings(logits, tokens) for logits in (reference, rounded, found))
    return Distances(
        base=from_base,
        rounded=distance(reference, rounded),
        fused=distance(reference, found),
        fused_to_rounded=distance(rounded, found),
        largest_logit=largest(reference),
        missing=lost[0],
        unexpected=lost[1],
    )


def _beginnings(logits: list[np.ndarray], of: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
    """As many places of each as `of` has: a causal model's are the same whatever follows."""
    return [rows[: len(other)] for rows, other in zip(logits, of, strict=True)]


def _lost(keys: Mapping[str, set[str]], base: Mapping[str, set[str]]) -> tuple[list[str], list[str]]:
    """Tensors that were not there, or not of the right shape, so that transformers drew them anew; and those too many.

    Without those of the base, which are the same whatever was trained.
    """
    fresh = (keys["missing_keys"] | keys["mismatched_keys"]) - base["missing_keys"] - base["mismatched_keys"]
    return sorted(fresh), sorted(keys["unexpected_keys"] - base["unexpected_keys"])


def load_transformers(folder: Path) -> tuple[Any, dict[str, set[str]]]:
    """The model in float32, and names of tensors by what was wrong with them: missing_keys and others of transformers."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, keys = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, trust_remote_code=False
    )
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
        tuned = PeftModel.from_pretrained(network, checkpoint).eval()
        rows = _answer_transformers(tuned, tokens, answers)
        reference = list(transformers_logits(tuned, rows))
        with tuned.disable_adapter():
            from_base = distance(_beginnings(reference, tokens), transformers_logits(tuned, tokens))
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
    return network, rows, reference, distance(_beginnings(reference, tokens), base)


def _round_torch(network: Any, stored: Stored) -> None:
    """The weights as the fused folder must store them, rounded by torch."""
    import torch

    for name, dtype in stored.items():
        weight = _torch_weight(network, name)
        weight.copy_(weight.to({"BF16": torch.bfloat16, "F16": torch.float16}[dtype]))


def _torch_weight(network: Any, name: str) -> Any:
    weights = dict(network.named_parameters(remove_duplicate=False))
    if name not in weights:
        raise VerificationError(f"{name}: transformers has no weight of this name to compare")
    return weights[name].data


def in_mlx(model: Path, checkpoint: Path, fused: Path, tokens: Tokens, stored: Stored, answers: Sequence[int]) -> Measured:
    """Base + checkpoint: the adapter added to, or the trained weights put among, the weights that MLX loaded."""
    from mlx_finetune.engines.mlx.load import load_model

    network = load_model(model, "float32")
    base = list(mlx_logits(network, tokens))
    (_train_mlx if is_full(checkpoint) else _add_to_mlx)(network, checkpoint)
    rows = _answer_mlx(network, tokens, answers)
    reference = list(mlx_logits(network, rows))
    _round_mlx(network, stored)
    rounded = list(mlx_logits(network, rows))
    del network
    gc.collect()  # one model in memory at a time
    found = list(mlx_logits(load_model(fused, "float32"), rows))
    names = [set(tensor_headers(folder)) for folder in (model, fused)]
    lost = sorted(names[0] - names[1]), sorted(names[1] - names[0])
    from_base = distance(_beginnings(reference, tokens), base)
    return Measured(_distances(tokens, reference, rounded, found, from_base, lost), rows, reference, found)


def _answer_mlx(network: Any, tokens: Tokens, answers: Sequence[int]) -> Rows:
    """Each row and the greedy tokens behind it."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    rows = [list(row) for row in tokens]
    for row, count in zip(rows, answers, strict=True):
        cache, fresh = make_prompt_cache(network), row
        for _ in range(count):
            row.append(int(np.array(network(mx.array([fresh]), cache=cache)[0, -1].astype(mx.float32)).argmax()))
            fresh = row[-1:]
    return rows


def mlx_logits(network: Any, tokens: Tokens) -> Iterator[np.ndarray]:
    """float32 [T, V] of each row."""
    import mlx.core as mx

    for row in tokens:
        yield np.array(network(mx.array([row]))[0].astype(mx.float32))


def _add_to_mlx(network: Any, checkpoint: Path) -> None:
    """Adds the adapter to the loaded float32 weights; MLX reads the checkpoint."""
    import mlx.core as mx

    config = read_json(checkpoint / CONFIG)
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    stored: Any = mx.load(str(checkpoint / TENSORS))
    tensors = {name.removeprefix(PEFT_PREFIX): np.array(value.astype(mx.float32)) for name, value in stored.items()}
    for module in sorted({name.rpartition(".lora_")[0] for name in tensors}):
        weight = _mlx_weight(network, f"{module}.weight")
        if weight is not None:
            own = {name.removeprefix(module): array for name, array in tensors.items() if name.startswith(f"{module}.lora_")}
            _put_into_mlx(network, f"{module}.weight", mx.array(_tuned(np.array(weight), own, scale), mx.float32))


def _tuned(weight: np.ndarray, own: Mapping[str, np.ndarray], scale: float) -> np.ndarray:
    """A weight with its module's matrices, by their suffixes."""
    product = own[LORA_B] @ own[LORA_A] if LORA_B in own else (own[EMBEDDING_B] @ own[EMBEDDING_A]).T
    summed = weight + scale * product
    return summed * (own[MAGNITUDE] / np.linalg.norm(summed, axis=1))[:, None] if MAGNITUDE in own else summed


def _train_mlx(network: Any, checkpoint: Path) -> None:
    import mlx.core as mx

    trained: Any = mx.load(str(checkpoint / SINGLE))
    for name, value in trained.items():
        if _mlx_weight(network, name) is not None:
            _put_into_mlx(network, name, value.astype(mx.float32))


def _round_mlx(network: Any, stored: Stored) -> None:
    """The weights as the fused folder must store them, rounded by MLX."""
    import mlx.core as mx

    for name, dtype in stored.items():
        weight = _mlx_weight(network, name)
        if weight is not None:
            _put_into_mlx(network, name, weight.astype({"BF16": mx.bfloat16, "F16": mx.float16}[dtype]).astype(mx.float32))


def _mlx_weight(network: Any, name: str) -> Any:
    """None for the head of a network whose embeddings are its head."""
    from mlx.utils import tree_flatten

    weights = dict(tree_flatten(network.parameters()))
    if name not in weights and name != HEAD_WEIGHT:
        raise VerificationError(f"{name}: MLX has no weight of this name to compare")
    return weights.get(name)


def _put_into_mlx(network: Any, name: str, value: Any) -> None:
    import mlx.core as mx

    mx.eval(value)
    network.load_weights([(name, value)], strict=False)
