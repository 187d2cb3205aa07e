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
from mlx_finetune.export.changes import is_full
from mlx_finetune.export.distance import Distance, Distances, VerificationError, distance, largest
from mlx_finetune.export.rows import HEAD_WEIGHT
from mlx_finetune.files import read_json
from mlx_finetune.models.weights import SINGLE, tensor_headers

Tokens = Sequence[Sequence[int]]
Stored = Mapping[str, str]  # tensor -> dtype, of the changed tensors that are stored in less than float32


def in_transformers(model: Path, checkpoint: Path, fused: Path, tokens: Tokens, stored: Stored) -> Distances:
    """Base + checkpoint: the adapter opened and merged by peft, or the trained weights put in by torch."""
    network, base_keys = _load_transformers(model)
    tune = _train_transformers if is_full(checkpoint) else _open_in_peft
    network, reference, from_base = tune(network, checkpoint, tokens)
    _round_torch(network, stored)
    rounded = list(_transformers_logits(network, tokens))
    del network
    gc.collect()  # one model in memory at a time
    loaded, keys = _load_transformers(fused)
    found = list(_transformers_logits(loaded, tokens))
    return Distances(
        base=from_base,
        rounded=distance(reference, rounded),
        fused=distance(reference, found),
        fused_to_rounded=distance(rounded, found),
        largest_logit=largest(reference),
        missing=sorted(keys["missing_keys"] - base_keys["missing_keys"]),
        unexpected=sorted(keys["unexpected_keys"] - base_keys["unexpected_keys"]),
    )


def _load_transformers(folder: Path) -> tuple[Any, dict[str, set[str]]]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, keys = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, trust_remote_code=False
    )
    return model.eval(), {kind: {str(name) for name in names} for kind, names in keys.items()}


def _transformers_logits(model: Any, tokens: Tokens) -> Iterator[np.ndarray]:
    import torch

    for row in tokens:
        with torch.inference_mode():
            yield model(torch.tensor([row])).logits[0].float().numpy()


def _open_in_peft(network: Any, checkpoint: Path, tokens: Tokens) -> tuple[Any, list[np.ndarray], Distance]:
    """The merged network, the logits before it was merged, and their distance to the base's."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for names that it is about to change
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # see `_merge`
        tuned = PeftModel.from_pretrained(network, checkpoint).eval()
        reference = list(_transformers_logits(tuned, tokens))
        with tuned.disable_adapter():
            from_base = distance(reference, _transformers_logits(tuned, tokens))
        return _merge(tuned), reference, from_base


def _merge(tuned: Any) -> Any:
    """peft 0.21 adds to a weight that embeddings and head share what it finds on either: the same change twice."""
    network = tuned.get_base_model()
    embeddings, head = network.get_input_embeddings(), network.get_output_embeddings()
    if hasattr(head, "base_layer") and head.weight is embeddings.weight:
        network.set_output_embeddings(head.base_layer)
    return tuned.merge_and_unload()


def _train_transformers(network: Any, checkpoint: Path, tokens: Tokens) -> tuple[Any, list[np.ndarray], Distance]:
    """The network with the trained weights in it, its logits, and their distance to the base's."""
    from safetensors import safe_open

    base = list(_transformers_logits(network, tokens))
    with safe_open(checkpoint / SINGLE, "pt") as file:
        for name in sorted(file.keys()):
            _torch_weight(network, name).copy_(file.get_tensor(name))
    reference = list(_transformers_logits(network, tokens))
    return network, reference, distance(reference, base)


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


def in_mlx(model: Path, checkpoint: Path, fused: Path, tokens: Tokens, stored: Stored) -> Distances:
    """Base + checkpoint: the adapter added to, or the trained weights put among, the weights that MLX loaded."""
    from mlx_finetune.engines.mlx.load import load_model

    network = load_model(model, "float32")
    base = list(_mlx_logits(network, tokens))
    (_train_mlx if is_full(checkpoint) else _add_to_mlx)(network, checkpoint)
    reference = list(_mlx_logits(network, tokens))
    _round_mlx(network, stored)
    rounded = list(_mlx_logits(network, tokens))
    del network
    gc.collect()  # one model in memory at a time
    found = list(_mlx_logits(load_model(fused, "float32"), tokens))
    names = [set(tensor_headers(folder)) for folder in (model, fused)]
    return Distances(
        base=distance(reference, base),
        rounded=distance(reference, rounded),
        fused=distance(reference, found),
        fused_to_rounded=distance(rounded, found),
        largest_logit=largest(reference),
        missing=sorted(names[0] - names[1]),
        unexpected=sorted(names[1] - names[0]),
    )


def _mlx_logits(network: Any, tokens: Tokens) -> Iterator[np.ndarray]:
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
