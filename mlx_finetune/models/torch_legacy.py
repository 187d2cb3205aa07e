"""Checkpoints that torch before 1.6 wrote, read by torch itself, which then runs only what makes tensors."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.models.torch_pickle import DAMAGED, STORAGES, Storage, Tensor, shown

BLOCK = 8 * 2**20  # bytes in memory at once
OF_TORCH = {name.removesuffix("Storage").lower(): name for name in STORAGES if name not in ("CharStorage", "ByteStorage")}
OF_TORCH |= {"int8": "CharStorage", "uint8": "ByteStorage"}
WEIGHTS = "a checkpoint of weights is needed, not of a whole model"


def legacy_tensors(file: Path) -> tuple[dict[str, Tensor], Callable[[Tensor], Iterator[bytes]]]:
    """Its tensors by name, and how the numbers of one are read; the whole file is in memory until both are gone.

    Raises:
        UserError: there is no torch, or it cannot load the file; something in it is no tensor.
    """
    weights = _loaded(file)
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"{file}: no dictionary of tensors", hint=WEIGHTS)
    described = {name: _described(file, name, value) for name, value in weights.items()}
    arrays = {id(tensor): array for tensor, array in described.values()}
    return {name: tensor for name, (tensor, _) in described.items()}, lambda tensor: blocks(arrays[id(tensor)])


def _loaded(file: Path) -> Any:
    if importlib.util.find_spec("torch") is None:
        hint = "pip install 'mlx-finetune[torch]', or take the model in safetensors"
        raise UserError(f"{file}: written by torch before 1.6, which only torch reads", hint=hint)
    import pickle
    import struct

    import torch

    of_damage = (pickle.UnpicklingError, struct.error, EOFError, OSError, RuntimeError)
    of_nonsense = (AssertionError, AttributeError, LookupError, TypeError, ValueError)  # what torch meets as it goes on with it
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (*of_damage, *of_nonsense) as error:
        raise UserError(f"{file}: torch cannot load it: {' '.join(str(error).split())[:120]}", hint=DAMAGED) from error


def _described(file: Path, name: Any, value: Any) -> tuple[Tensor, np.ndarray]:
    """A tensor whose numbers lie in order, and their bytes."""
    import torch

    kinds = {getattr(torch, dtype): kind for dtype, kind in OF_TORCH.items()}
    if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.dtype not in kinds:
        raise UserError(f"{file}: {str(name)[:80]!r} is no tensor of a known kind", hint=WEIGHTS)
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(f"{file}: tensor {shown(name)} repeats the numbers of its storage", hint=DAMAGED)
    dense = value.detach().contiguous()
    strides = tuple(math.prod(dense.shape[axis + 1 :]) for axis in range(dense.ndim))
    tensor = Tensor(Storage(name, *STORAGES[kinds[value.dtype]], dense.numel()), 0, tuple(dense.shape), strides)
    return tensor, dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy()


def blocks(array: np.ndarray) -> Iterator[bytes]:
    """Its bytes in row-major order."""
    if array.nbytes <= BLOCK:
        yield array.tobytes()
        return
    rows = BLOCK // (array.nbytes // len(array))
    for first in range(0, len(array), max(rows, 1)):
        yield from blocks(array[first : first + rows] if rows else array[first])
