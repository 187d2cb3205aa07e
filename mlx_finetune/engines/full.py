"""Full fine-tuning: which weights are trained, and what they are in the original checkpoint. Numpy only."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mlx_finetune.config import RunConfig
from mlx_finetune.engines.adapter import LAYER, check_some, last_layers, named
from mlx_finetune.errors import UserError
from mlx_finetune.models.tensor_names import stored_name
from mlx_finetune.models.weights import ITEM_BYTES, TensorLocation, read_float32, tensor_headers

Shapes = dict[str, tuple[int, ...]]


def choose_weights(weights: Mapping[str, tuple[int, ...]], config: RunConfig) -> Shapes:
    """The weights to train, of all that the model has: every one, those of the last layers, or those of named modules.

    Raises:
        UserError: a name or a pattern in `target_modules` that no module has, or more layers than the model has.
    """
    last = last_layers(weights, config)
    chosen = {name: tuple(shape) for name, shape in sorted(weights.items())}
    if config.num_layers:
        chosen = {n: shape for n, shape in chosen.items() if (found := LAYER.search(n)) and int(found[1]) in last}
    if config.target_modules != "all-linear":
        modules = set(named(list(dict.fromkeys(map(_module_of, weights))), config.target_modules))
        chosen = {name: shape for name, shape in chosen.items() if _module_of(name) in modules}
    return check_some(chosen, config)


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def read_weights(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], headers: Mapping[str, TensorLocation] | None = None
) -> dict[str, np.ndarray]:
    """The trained weights as they are in the checkpoint of `folder`, float32; `headers`: of that, where they were read.

    Raises:
        UserError: a weight that the checkpoint does not have by that name and shape: it could not be handed back.
    """
    headers = tensor_headers(folder) if headers is None else headers
    arrays = {}
    for name, shape in shapes.items():
        tensor = headers.get(stored_name(name, headers))
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype not in ITEM_BYTES:
            raise UserError(
                f"{name}: not a tensor of that name and shape in {folder}, so a tuned model could not be handed back",
                hint="fine_tune_type = lora, or name target_modules",
            )
        arrays[name] = read_float32(tensor).reshape(shape)
    return arrays
