"""Whether a model of transformers' can be trained as the engine does it: its layers first, and then its head on what they give."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from mlx_finetune.engines.adapter import Target
from mlx_finetune.errors import UserError

TOKENS = 4
READ_RIGHTLY = ("qwen2_moe",)  # by peft, as tests/test_torch_architectures.py sees, although its tables say otherwise
CLOSE = 1e-2  # of the largest logit; bfloat16 rounds to 4e-3


class States:
    """What layers give, by name or as the first of a tuple; whatever else a model asks for is not there."""

    def __init__(self, states: torch.Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, which: Any) -> Any:
        return (self.last_hidden_state,)[which]

    def __getattr__(self, name: str) -> None:
        return None


class Given(torch.nn.Module):
    """Stands in for the layers of a model and gives hidden states that are there already."""

    def __init__(self, states: torch.Tensor, own: torch.nn.Module) -> None:
        """`own`: the layers; what the model asks of them beside calling them, they answer."""
        super().__init__()
        self._states, self._own = states, [own]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_own"][0], name)

    def forward(self, *arguments: Any, **named: Any) -> States:
        """The hidden states."""
        return States(self._states)


def check_peft_reads(model: PreTrainedModel, adapted: Mapping[str, Target], dora: bool) -> None:
    """Of some mixtures of experts peft takes gate_proj and the like for parts of the experts, also where a path says otherwise.

    Named as weights, as `peft_config` names them, they are read rightly; but peft has no DoRA of those.

    Raises:
        UserError: such a module is adapted in another way.
    """
    if not any("expert" in key for key in model.config.get_text_config().to_dict()):
        return  # before peft is imported, which takes seconds and 70 MB
    try:
        from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
    except ImportError:  # no peft, or one that does not do this
        return
    kind = model.config.model_type
    taken = _MOE_TARGET_MODULE_MAPPING.get(_MODEL_TO_CONVERSION_PATTERN.get(kind, kind), {})
    taken_for = {name: target for name, target in adapted.items() if name.rpartition(".")[2] in taken}
    wrong = sorted(name for name, t in taken_for.items() if t.kind == "linear" and (dora or not t.beside_experts))
    if wrong and kind not in READ_RIGHTLY:
        hint = "adapt its attention: --set target_modules=q_proj,k_proj,v_proj,o_proj, or as its projections are called"
        raise UserError(f"{kind}: peft would read an adapter on {wrong[0]} as one of the experts'", hint=hint)


@torch.no_grad()
def check_fits(
    model: PreTrainedModel, adapted: Mapping[str, torch.nn.Module], trained_way: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Computes logits of a few tokens in both ways.

    Raises:
        UserError: they differ, or an adapted module was not asked: its adapter would have no effect, or this is not how it works.
    """
    kind = model.config.model_type
    hint = "this architecture comes later; MLX may have it, or another model"
    asked: set[str] = set()
    hooks = [module.register_forward_hook(lambda *_, name=name: asked.add(name)) for name, module in adapted.items()]
    tokens = torch.arange(TOKENS, device=next(model.parameters()).device)[None] + 3
    try:
        plain, ours = model(input_ids=tokens, use_cache=False).logits[0], trained_way(tokens)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:120]
        raise UserError(f"the torch engine does not train {kind} yet ({type(error).__name__}: {said})", hint=hint) from error
    finally:
        for hook in hooks:
            hook.remove()
    silent = sorted(name for name in adapted if name not in asked and ".experts." not in name)
    if silent:
        raise UserError(f"{kind}: {silent[0]} is not asked for what it computes, so an adapter on it has no effect", hint=hint)
    if not (plain - ours).abs().max() <= CLOSE * plain.abs().max():  # NaN is no equality
        raise UserError(f"the torch engine does not train {kind} yet: its head needs more than its layers give", hint=hint)
