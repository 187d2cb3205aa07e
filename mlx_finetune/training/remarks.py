"""What a person should know of a run before it starts, read from the files of the model and the data."""

import json
import math
import re
from pathlib import Path

import numpy as np

from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import WIDTHS
from mlx_finetune.data.dataset import ExampleStore
from mlx_finetune.data.trees import plan as fold
from mlx_finetune.data.trees import tokens_of
from mlx_finetune.engines.experts import speaks_of_experts
from mlx_finetune.engines.supported import folds
from mlx_finetune.files import read_json
from mlx_finetune.models.mlx_config import text_config
from mlx_finetune.models.mlx_proven import PROVEN
from mlx_finetune.models.weights import ITEM_BYTES, TensorLocation, read_rows, tensor_headers
from mlx_finetune.training.checkpoints import aside
from mlx_finetune.training.manifest import read_progress
from mlx_finetune.training.run import Plan, packed

LOOKED_AT = 200  # examples
STEPS_LOOKED_AT, WORTH_SAYING = 10, 0.15  # for advice on folding; a share of the tokens
COMPUTES = ("engine", "dtype", "quantization", "optimizer")  # what computes, and in what the frozen weights are read
TOO_SHORT = 0.1  # of the length that embeddings usually have
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # how many there are, by architecture
EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight", "embed_tokens.weight")


def untrained_tokens(model: Path, config: RunConfig, examples: ExampleStore) -> str | None:
    """Special tokens of the data whose embeddings nobody ever trained, where this run does not train them either; in a sentence.

    Told by their embeddings: next to nothing, or the same for several tokens.
    """
    if _trains_embeddings(config):
        return None
    special, location = _special(model), _embeddings(model)
    if not special or location is None:
        return None
    used: set[int] = set()
    for index in range(min(LOOKED_AT, len(examples))):
        used |= special.keys() & set(np.unique(examples[index].tokens).tolist())
    used = {token for token in used if token < location.shape[0]}
    if not used:
        return None
    rows = read_rows(location, sorted(used))
    usual = read_rows(location, np.linspace(0, location.shape[0] - 1, 256).astype(int).tolist())
    lengths = np.linalg.norm(rows, axis=1)
    short = lengths < TOO_SHORT * np.median(np.linalg.norm(usual, axis=1))
    same = [any(np.array_equal(row, other) for j, other in enumerate(rows) if j != i) for i, row in enumerate(rows)]
    names = [special[token] for token, bad in zip(sorted(used), short | np.array(same), strict=True) if bad]
    if not names:
        return None
    hint = "name embed_tokens in target_modules too, and lm_head where the model has one"
    return f"{', '.join(names)}: in the data, but the model never learned their embeddings, nor will this run ({hint})"


def folds_nothing(config: RunConfig) -> str | None:
    """That a setting has nothing to act on, in a sentence."""
    if not config.pack_length or folds(config):
        return None
    if config.share_prefixes == "never":
        return "pack_length has no effect: share_prefixes = never folds nothing together"
    other = "neftune_noise_alpha" if config.neftune_noise_alpha else "attention = flash"
    return f"pack_length has no effect: with {other} nothing is folded together"


def looks_at_nothing(config: RunConfig, held_out: int) -> str | None:
    """That a setting of what is looked at on the way has no effect, in a sentence; `held_out`: examples."""
    if config.patience and not held_out:
        return "patience has no effect: nothing was held out"
    if config.sample_prompts and config.fsdp:
        return "no held-out turns are answered on the way: with fsdp every process would have to compute along"
    return None


def experts_left_alone(model: Path, config: RunConfig) -> str | None:
    """That the experts of a mixture are not adapted, in a sentence."""
    found = read_json(model / "config.json")
    found |= found.get("text_config") or {}
    if config.fine_tune_type == "full" or not any(map(found.get, EXPERTS)) or speaks_of_experts(config.target_modules):
        return None
    hint = "" if config.fine_tune_type == "dora" else " (name experts in target_modules to adapt them: all-linear,experts)"
    return f"a mixture of experts: the experts are not adapted{hint}, nor is what chooses among them"


def _trains_embeddings(config: RunConfig) -> bool:
    if config.fine_tune_type == "full" and (config.num_layers or config.target_modules == "all-linear"):
        return not config.num_layers
    modules = [name.removesuffix(".weight") for name in EMBEDDINGS]
    asked = config.target_modules
    if isinstance(asked, str):
        return asked != "all-linear" and any(re.fullmatch(asked, module) for module in modules)
    return any(module in asked or module.rpartition(".")[2] in asked for module in modules)


def _special(model: Path) -> dict[int, str]:
    """Tokens that are added to a vocabulary as such, by their number."""
    path = model / "tokenizer.json"
    if not path.is_file():
        return {}
    added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
    return {int(token["id"]): str(token["content"]) for token in added if token.get("special")}


def _embeddings(model: Path) -> TensorLocation | None:
    headers = tensor_headers(model)
    found = next((headers[name] for name in EMBEDDINGS if name in headers), None)
    return found if found is not None and found.dtype in ITEM_BYTES else None


def moved(plan: Plan) -> str | None:
    """What it means that a run goes on elsewhere than it went so far, in a sentence; None where it does not."""
    if not plan.checkpoint:
        return None
    then, config = read_progress(plan.checkpoint), plan.config
    before = then.get("config", {}) | {"engine": then.get("engine")}
    changed = {name: before[name] for name in COMPUTES if before.get(name) not in (None, getattr(config, name))}
    other = None if "engine" in changed else _other_device(config, then.get("device"))
    if not changed and not other:
        return None
    what = ", ".join(
        [*(f"{name} {value} -> {getattr(config, name)}" for name, value in changed.items()), *([other] if other else [])]
    )
    dropout = ", and dropout drops others" if config.dropout and "engine" in changed else ""
    trained = "weights" if config.fine_tune_type == "full" else "adapter"
    return f"goes on with {what}: {trained}, optimizer and place in the data are the same; rounding differs{dropout}"


def _other_device(config: RunConfig, before: str | None) -> str | None:
    """That the torch engine computes elsewhere now, in words."""
    if config.engine != "torch" or before is None:
        return None
    from mlx_finetune.engines.torch.device import check_device, half_of

    now = check_device(config)
    weights = f" (weights in {half_of(now)})" if config.dtype == "auto" else ""
    return f"device {before} -> {now}{weights}" if now != before else None


def folding_advice(plan: Plan) -> str | None:
    """What `pack_length` would save where the examples of a step begin alike, in a sentence; None where that is little."""
    config, dataset = packed(plan.config, plan.dataset), plan.dataset
    architecture = PROVEN.get(str(text_config(read_json(plan.model / "config.json")).get("model_type")))
    if not config.pack_length or plan.config.pack_length or (architecture and architecture.own_attention):
        return None
    now, folded, most = 0, 0, 0
    for step in range(min(STEPS_LOOKED_AT, dataset.steps_per_epoch(config))):
        batches = dataset.batches_at(step, config)
        whole = sum(len(tree.inputs) for tree in fold(batches, sum(batch.inputs.size for batch in batches)))
        now += min(tokens_of(batches), sum(len(tree.inputs) for tree in fold(batches, config.pack_length)))
        folded, most = folded + whole, max(most, whole)
    if folded > (1 - WORTH_SAYING) * now:
        return None
    length = math.ceil(most / WIDTHS) * WIDTHS
    return f"with pack_length={length} {1 - folded / now:.0%} fewer tokens are computed, and more memory is used at once"


def gone_back(plan: Plan) -> list[str]:
    """A sentence for each damaged checkpoint that the run does not go on from: why, and where it is left."""
    return [f"{one.folder} is DAMAGED: {one.reason}; kept as {aside(one.folder).name}" for one in plan.damaged]
