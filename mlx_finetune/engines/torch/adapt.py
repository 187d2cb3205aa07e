"""What is trained of a model of transformers': adapters beside chosen modules, or chosen weights themselves."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from mlx_finetune.config import RunConfig
from mlx_finetune.engines.adapter import (
    HEAD,
    LAYER,
    Target,
    check_targets,
    choose_targets,
    is_bypassed,
    scale_of,
    trained_shapes,
)
from mlx_finetune.engines.full import choose_weights
from mlx_finetune.engines.torch.experts import adapt_experts, expert_targets
from mlx_finetune.engines.torch.lora import LoRAEmbedding, LoRALinear, TiedHead

Parameters = Mapping[str, torch.nn.Parameter]


@dataclass(frozen=True)
class Trained:
    """What learns, by PEFT's names; where the weights themselves do, there are no targets and no modules of adapters."""

    parameters: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)
    modules: dict[str, Any] = field(default_factory=dict)


def choose(model: PreTrainedModel, config: RunConfig) -> Trained:
    """Puts adapters beside the modules that are chosen, or lets the weights that are chosen be trained themselves."""
    return Trained(_thaw(model, config)) if config.fine_tune_type == "full" else _adapt(model, config)


def _thaw(model: PreTrainedModel, config: RunConfig) -> dict[str, torch.nn.Parameter]:
    parameters = {name: p for name, p in model.named_parameters() if name.startswith((decoder_path(model), HEAD))}
    chosen = choose_weights({name: tuple(p.shape) for name, p in parameters.items()}, config)
    return {name: parameters[name].requires_grad_() for name in chosen}


def _adapt(model: PreTrainedModel, config: RunConfig) -> Trained:
    modules = dict(model.named_modules())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    targets = choose_targets(_known(model, modules, tied), config)
    check_targets(targets, tied, config, next((n for n, m in modules.items() if m is head), HEAD))
    made = adapt_experts(model, targets, config)
    scale, dora = scale_of(config), config.fine_tune_type == "dora"
    for path, target in ((path, target) for path, target in targets.items() if target.kind != "experts"):
        base, is_linear = modules[path], target.kind == "linear"
        made[path] = (
            LoRALinear(base, config.rank, scale, config.dropout, dora) if is_linear else LoRAEmbedding(base, config.rank, scale)
        )
        model.set_submodule(path, made[path])
        if target.kind == "tied":
            model.set_output_embeddings(TiedHead(head, made[path]))
    for module in made.values():
        module.training = False
    return Trained({name: _parameter(made, name) for name in trained_shapes(targets, config)}, targets, made)


def _known(model: PreTrainedModel, modules: Mapping[str, Any], tied: bool) -> dict[str, Target]:
    """What could be adapted."""
    decoder, embedding = decoder_path(model), model.get_input_embeddings()
    linear = {n: m for n, m in modules.items() if isinstance(m, torch.nn.Linear) and is_of_text(n, decoder)}
    parents = {n: modules[n.rpartition(".")[0]] for n in linear}
    known = {n: Target(m.out_features, m.in_features, bypassed=is_bypassed(n, parents[n])) for n, m in linear.items()}
    (name,) = (n for n, m in modules.items() if m is embedding)
    known[name] = Target(embedding.num_embeddings, embedding.embedding_dim, "tied" if tied else "embedding")
    return known | expert_targets(model)


def _parameter(made: Mapping[str, Any], name: str) -> torch.nn.Parameter:
    module, _, leaf = name.removesuffix(".weight").rpartition(".")
    parameter: torch.nn.Parameter = getattr(made[module], leaf)
    return parameter


def head_parameters(model: PreTrainedModel, parameters: Parameters) -> list[torch.Tensor]:
    """What is trained and used behind the layers."""
    head = model.get_output_embeddings()
    found = {id(parameter) for parameter in head.parameters()}
    if isinstance(head, TiedHead):
        found |= {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    return [parameter for parameter in parameters.values() if id(parameter) in found]


def decoder_path(model: PreTrainedModel) -> str:
    """Of what reads text, with a dot behind it; empty where that is the whole model."""
    decoder = model.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")


def is_of_text(name: str, decoder: str) -> bool:
    """Whether a module or an array is of what reads text, and not of layers that see or hear."""
    return not LAYER.search(f"{name}.") or name.startswith(decoder)
