"""Full fine-tuning: which weights are trained, and what they are in the original checkpoint. Numpy only."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mlx_finetune.config import RunConfig
from mlx_finetune.engines.adapter import LAYER
from mlx_finetune.errors import UserError
from mlx_finetune.models.weights import ITEM_BYTES, read_float32, tensor_headers

Shapes = dict[str, tuple[int, ...]]


def choose_weights(weights: Mapping[str, tuple[int, ...]], config: RunConfig) -> Shapes:
    """The weights to train, of all that the model has: every one, those of the last layers, or those of named modules.

    Raises:
        UserError: a name or a pattern in `target_modules` that no module has, or more layers than the model has.
    """
    layers = sorted({int(found[1]) for name in weights if (found := LAYER.search(name))})
    if config.num_layers and config.num_layers > len(layers):
        raise UserError(f"num_layers = {config.num_layers}: the model has {len(layers)}", hint="leave it out to train all")
    chosen = {name: tuple(shape) for name, shape in sorted(weights.items())}
    if config.num_layers:
        last = set(layers[-config.num_layers :])
        chosen = {n: shape for n, shape in chosen.items() if (found := LAYER.search(n)) and int(found[1]) in last}
    if config.target_modules == "all-linear":
        return chosen
    return {name: shape for name, shape in chosen.items() if name in _named(list(weights), config.target_modules)}


def _named(weights: list[str], asked: str | tuple[str, ...]) -> set[str]:
    modules = {name: name.rpartition(".")[0] for name in weights}
    if isinstance(asked, str):
        found = {name for name, module in modules.items() if re.fullmatch(asked, module)}
        if not found:
            raise UserError(f"target_modules: {asked!r} matches no layer", hint=f"a path is such as {modules[weights[0]]}")
        return found
    known = {module.rpartition(".")[2] for module in modules.values()}
    for target in asked:
        if target not in known and target not in modules.values():
            near = difflib.get_close_matches(target, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}"
            raise UserError(f"target_modules: no layer of this model is called {target!r}", hint=hint)
    return {name for name, module in modules.items() if module in asked or module.rpartition(".")[2] in asked}


def read_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The trained weights as they are in the checkpoint of `folder`, float32.

    Raises:
        UserError: a weight that the checkpoint does not have by that name and shape: it could not be handed back.
    """
    headers = tensor_headers(folder)
    arrays = {}
    for name, shape in shapes.items():
        tensor = headers.get(name)
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype not in ITEM_BYTES:
            raise UserError(
                f"{name}: not a tensor of that name and shape in {folder}, so a tuned model could not be handed back",
                hint="fine_tune_type = lora, or name target_modules",
            )
        arrays[name] = read_float32(tensor).reshape(shape)
    return arrays
