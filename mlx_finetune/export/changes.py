"""What a checkpoint changes in the original weights: which tensors, and what becomes of their rows.

LoRA: W + scale * B @ A; of embeddings W + scale * (B @ A)^T. DoRA: each row of that sum, made as long as the trained magnitude
says. Full fine-tuning: the trained tensor itself. A weight that embeddings and head share changes once.
"""

from functools import partial
from pathlib import Path

import numpy as np

from mlx_finetune.engines.adapter import HEAD
from mlx_finetune.errors import UserError
from mlx_finetune.export.adapter import TENSORS, Adapter, Pair, read_adapter
from mlx_finetune.export.expert_changes import expert_changes
from mlx_finetune.export.from_mlx import is_mlx_adapter, mlx_changes
from mlx_finetune.export.rows import (
    BASE,
    HEAD_WEIGHT,
    Change,
    Headers,
    Rows,
    factored,
    finite,
    fitting,
    original,
    trained_rows,
)
from mlx_finetune.models.tensor_names import stored_name, tensor_of
from mlx_finetune.models.weights import ITEM_BYTES, SINGLE, TensorLocation, file_headers, read_float32

PROGRESS = "progress.json"
EMBEDDINGS = "embed_tokens"
# Embeddings and heads of models that call them otherwise: which of them share a weight is not known here.
OTHER_NAMES = ("embed_in", "embed_out", "wte")
BOTH = "train embed_tokens, which adapts the head alike"


def is_full(checkpoint: Path) -> bool:
    """Whether a checkpoint holds weights themselves and not an adapter."""
    return not (checkpoint / TENSORS).exists() and (checkpoint / SINGLE).is_file() and (checkpoint / PROGRESS).is_file()


def read_changes(model: Path, checkpoint: Path) -> dict[str, Change]:
    """The tensors of `model` that the checkpoint changes, by name, in the order of the files.

    Raises:
        UserError: a broken file; a checkpoint that does not fit the model, or of a kind that cannot be fused.
    """
    changes = _changes(model, checkpoint)
    return dict(sorted(changes.items(), key=lambda item: (item[1].location.file.name, item[1].location.start)))


def _changes(model: Path, checkpoint: Path) -> dict[str, Change]:
    if is_mlx_adapter(checkpoint):
        return mlx_changes(model, checkpoint)
    return _full_changes(model, checkpoint) if is_full(checkpoint) else _lora_changes(model, read_adapter(checkpoint))


def base_weights(model: Path, adapter: Adapter) -> dict[str, tuple[str, TensorLocation]]:
    """The tensor of the original checkpoint, by its name there, that each adapted module changes.

    Of embeddings and head that share a weight, only those whose name it has.

    Raises:
        UserError: a module without such a tensor, of another shape, quantised, or that must not change alone.
    """
    headers, is_tied = original(model)
    alias = _alias(model, adapter, headers) if is_tied else ""
    found = {}
    for module, pair in adapter.pairs.items():
        name, by = module.rpartition(".")[2], f"adapter on {module}"
        if name in OTHER_NAMES:
            raise UserError(f"{by}: its weight may be tied to another; fusing would part them", hint="leave it out")
        if pair.on_embeddings != (name == EMBEDDINGS):
            kind = "embeddings" if pair.on_embeddings else "a linear layer"
            raise UserError(f"{by}: its matrices are those of {kind}", hint=BASE)
        if module != alias:
            tensor = tensor_of(module, headers)
            found[module] = tensor, fitting(model, headers, tensor, pair.shape, f"{by}: the adapter changes")
    return found


def _alias(model: Path, adapter: Adapter, headers: Headers) -> str:
    """Of adapted embeddings and head that share a weight, the one under whose name it is not stored; else nothing.

    Raises:
        UserError: only one of them is adapted, or the two unlike.
    """
    embeddings = next((module for module, pair in adapter.pairs.items() if pair.on_embeddings), "")
    if not embeddings and HEAD not in adapter.pairs:
        return ""
    if not embeddings or HEAD not in adapter.pairs:
        raise UserError(f"adapter on {embeddings or HEAD} alone: {model} has one tensor for embeddings and head", hint=BOTH)
    if not _is_alike(adapter.pairs[embeddings], adapter.pairs[HEAD]):
        what = f"adapters on {embeddings} and {HEAD} are not the same change"
        raise UserError(f"{what}, but {model} has one tensor for both", hint=BOTH)
    return HEAD if HEAD_WEIGHT not in headers else "" if f"{embeddings}.weight" in headers else embeddings


def _is_alike(embeddings: Pair, head: Pair) -> bool:
    sides = ((embeddings.a, head.b), (embeddings.b, head.a))
    return all(np.array_equal(read_float32(one).T, read_float32(other)) for one, other in sides)


def _lora_changes(model: Path, adapter: Adapter) -> dict[str, Change]:
    weights = base_weights(model, adapter)
    headers, _ = original(model)
    of_experts = expert_changes(model, headers, adapter.of_experts)
    return of_experts | {tensor: Change(at, partial(_lora_rows, adapter, module)) for module, (tensor, at) in weights.items()}


def _lora_rows(adapter: Adapter, module: str) -> Rows:
    return factored(*_read_factors(adapter, module))


def _read_factors(adapter: Adapter, module: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """scale * B [rows, r] and A [r, columns] of the weight, and the magnitude [rows] of DoRA; float32.

    Laid out alike whether of embeddings or of a linear layer: where a shared weight is stored twice, both get the same bits.

    Raises:
        UserError: a number that is not finite: a training that diverged.
    """
    pair = adapter.pairs[module]
    a, b = finite(pair.a, module), finite(pair.b, module)
    magnitude = finite(pair.magnitude, module) if pair.magnitude else None
    left, right = (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)) if pair.on_embeddings else (b, a)
    return np.float32(pair.scale) * left, right, magnitude


def _full_changes(model: Path, checkpoint: Path) -> dict[str, Change]:
    headers, is_tied = original(model)
    trained = file_headers(checkpoint / SINGLE)
    if not trained:
        raise UserError(f"{checkpoint / SINGLE}: no tensors", hint="use a checkpoint folder of a finished save")
    changes = {}
    for name, source in trained.items():
        by = f"{checkpoint / SINGLE}: {name}"
        if ".experts." in name:
            raise UserError(f"{by}: experts cannot be fused yet", hint="train layers other than the experts")
        if source.dtype not in ITEM_BYTES:
            raise UserError(
                f"{by}: dtype {source.dtype} is not one of {', '.join(ITEM_BYTES)}",
                hint="use a checkpoint folder of a finished save",
            )
        tensor = stored_name(name, headers)
        location = fitting(model, headers, tensor, source.shape, f"{by} is")
        changes[tensor] = Change(location, partial(trained_rows, name, source))
    if is_tied and HEAD_WEIGHT in headers:
        changes |= _second_copy(model, headers, trained)
    return changes


def _second_copy(model: Path, headers: Headers, trained: Headers) -> dict[str, Change]:
    """What becomes of the head where a shared weight is stored twice and trained as embeddings."""
    trained = {stored_name(name, headers): source for name, source in trained.items()}
    embeddings = next((name for name in headers if name.endswith(f"{EMBEDDINGS}.weight")), "")
    if embeddings in trained and HEAD_WEIGHT not in trained:
        source = trained[embeddings]
        location = fitting(model, headers, HEAD_WEIGHT, source.shape, f"{embeddings} is")
        return {HEAD_WEIGHT: Change(location, partial(trained_rows, embeddings, source))}
    if HEAD_WEIGHT in trained:
        raise UserError(f"{HEAD_WEIGHT}: {model} has one tensor for embeddings and head", hint=BOTH)
    return {}
