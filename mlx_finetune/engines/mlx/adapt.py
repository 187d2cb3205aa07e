"""What is trained of a model of mlx-lm's: adapters beside chosen modules, or chosen weights themselves."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_finetune.config import RunConfig
from mlx_finetune.engines.adapter import HEAD, Target, check_targets, choose_targets, is_bypassed, scale_of
from mlx_finetune.engines.experts import check_dora
from mlx_finetune.engines.full import choose_weights, read_weights
from mlx_finetune.engines.mlx.experts import Names, adapt_experts, expert_targets
from mlx_finetune.engines.mlx.lora import LoRAEmbedding, LoRALinear
from mlx_finetune.errors import UserError
from mlx_finetune.models.tensor_names import transformers_name
from mlx_finetune.models.weights import tensor_headers


@dataclass(frozen=True)
class Adapters:
    """What was adapted, by the paths that PEFT gives it; nothing where the weights themselves are trained."""

    targets: dict[str, Target] = field(default_factory=dict)
    modules: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)  # in the model -> what PEFT calls them


def is_tied(model: nn.Module) -> bool:
    """Whether the head is the embeddings."""
    return not any(name.rpartition(".")[2] == HEAD for name, _ in model.named_modules())


def adapt(model: nn.Module, names: Names, config: RunConfig) -> Adapters:
    """Puts adapters beside the modules that are chosen."""
    paths, tied = dict(model.named_modules()), is_tied(model)
    own = {transformers_name(path, names): path for path in paths}
    modules = {name: paths[path] for name, path in own.items()}
    targets = choose_targets(_known(modules, paths, own, tied) | expert_targets(model, names), config)
    check_targets(targets, tied, config)
    scale, dora = scale_of(config), config.fine_tune_type == "dora"
    if dora:
        check_dora(model.model_type, (name for name, target in targets.items() if target.beside_experts))
    made: dict[str, Any] = {}
    for path, target in targets.items():
        module, shape = modules.get(path), (target.rows, target.columns)
        if target.kind == "linear":
            made[path] = LoRALinear(module, shape, config.rank, scale, config.dropout, dora)
        elif target.kind != "experts":
            made[path] = LoRAEmbedding(module, shape, config.rank, scale)
    of_experts, called = adapt_experts(model, names, targets, config)
    made |= {called[path]: module for path, module in of_experts.items()}
    own |= {name: path for path, name in called.items()}
    model.update_modules(tree_unflatten([(own[name], module) for name, module in made.items()]))
    return Adapters(targets, made, {own[name]: name for name in made})


def _known(modules: dict[str, Any], paths: dict[str, Any], own: dict[str, str], tied: bool) -> dict[str, Target]:
    """What could be adapted, experts aside."""
    linear = {n: m for n, m in modules.items() if isinstance(m, nn.Linear | nn.QuantizedLinear)}
    parents = {n: paths[own[n].rpartition(".")[0]] for n in linear}
    known = {n: Target(*_shape(m), bypassed=is_bypassed(n, parents[n])) for n, m in linear.items()}
    for name, module in modules.items():
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            known[name] = Target(*_shape(module), "tied" if tied else "embedding")
    return known


def thaw(model: nn.Module, name_of: Callable[[str], str], folder: Path, config: RunConfig) -> None:
    """Lets the weights that are chosen be trained themselves. `name_of`: what transformers calls an array of the model.

    Raises:
        UserError: an array is not what stands in `folder`.
    """
    arrays = {name_of(path): (path, array) for path, array in tree_flatten(model.parameters())}
    modules = dict(model.named_modules())
    for name in choose_weights({name: tuple(array.shape) for name, (_, array) in arrays.items()}, config):
        module, _, leaf = arrays[name][0].rpartition(".")
        modules[module].unfreeze(keys=leaf, recurse=False)
    headers = tensor_headers(folder)
    for path, array in tree_flatten(model.trainable_parameters()):
        ((own, stored),) = read_weights(folder, {name_of(path): tuple(array.shape)}, headers).items()
        if not np.array_equal(np.array(array), stored):
            hint = "fine_tune_type = lora, or --engine torch"
            raise UserError(f"{own}: mlx-lm's class changes it as it reads it, so it could not be handed back", hint=hint)


def _shape(module: Any) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (
        (rows, columns * 32 // module.bits) if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding) else (rows, columns)
    )
