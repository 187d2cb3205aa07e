"""What is trained, how it starts, and what PEFT calls it. Numpy only: both engines begin with the same numbers."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np

from mlx_finetune.config import RunConfig
from mlx_finetune.engines import experts
from mlx_finetune.errors import UserError
from mlx_finetune.nearest import did_you_mean

PEFT_PREFIX = "base_model.model."
LAYER = re.compile(r"\.(\d+)\.")
ALL_LINEAR = "all-linear"
ROUTERS = ("gate", "router", "shared_expert_gate")  # of mixtures of experts: small, and easily led astray
HEAD = "lm_head"
LORA_A, LORA_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
SPLIT = ("kv_b_proj",)  # of latent attention (DeepSeek): mlx-lm has it in two pieces, so only torch adapts it, where it is named
BYPASSED = ("out_proj", "x_proj", "dt_proj")
Chosen = TypeVar("Chosen", bound=Mapping[str, Any])
Norms = Callable[[str], np.ndarray]  # of a module: the length of each row of its weight, float32 [rows]


@dataclass(frozen=True)
class Target:
    """A module with a weight [rows, columns] that can be adapted, or one projection of all experts: `count` such weights."""

    rows: int
    columns: int
    kind: Literal["linear", "embedding", "tied", "experts"] = "linear"  # tied: embeddings whose weight is the head's too
    count: int = 1
    beside_experts: bool = False  # a linear layer whose name peft would take for a projection of the experts
    bypassed: bool = False  # of Mamba: its fused kernel reads the weight without asking the module, past an adapter


def is_bypassed(name: str, of_mamba: Any) -> bool:
    """Whether a module of that path, in `of_mamba`, is one that Mamba's fused kernels pass by."""
    return name.rpartition(".")[2] in BYPASSED and all(hasattr(of_mamba, part) for part in ("A_log", "D"))


def choose_targets(modules: Mapping[str, Target], config: RunConfig) -> dict[str, Target]:
    """The modules to adapt, of all that the model has, by path. Head, embeddings and experts are among them where they are named.

    Raises:
        UserError: a name or a pattern in `target_modules` that no module has or that cannot be adapted, or more layers than
            the model has.
    """
    modules = _marked(modules)
    in_layers = [name for name in modules if LAYER.search(name) and not set(name.split(".")) & set(ROUTERS)]
    passed_by = [name for name in in_layers if modules[name].bypassed]
    in_layers = [name for name in in_layers if not modules[name].bypassed]
    if asked := [name for name in passed_by if {name, name.rsplit(".", 1)[-1]} & set(config.target_modules)]:
        what = f"target_modules: {asked[0]} is of Mamba, whose fused kernels read its weight past an adapter"
        raise UserError(what, hint="leave it out")
    if not in_layers:
        raise UserError("this model has no linear layers that can be adapted", hint="choose a model of another architecture")
    last = last_layers(in_layers, config)
    outside = [name for name in modules if not LAYER.search(name)]
    of_experts = [name for name in in_layers if modules[name].kind == "experts"]
    layers = [name for name in in_layers if modules[name].kind != "experts"]
    chosen = _meant(layers, outside, of_experts, config.target_modules)
    kept = {n: modules[n] for n in chosen if not (found := LAYER.search(n)) or int(found[1]) in last}
    return check_some(kept, config)


def _meant(layers: list[str], outside: list[str], of_experts: list[str], asked: str | tuple[str, ...]) -> list[str]:
    """The modules that `target_modules` means. Experts only where it speaks of them: other names mean what they mean without."""
    everything = [name for name in layers if name.rpartition(".")[2] not in SPLIT]
    if asked == ALL_LINEAR:
        return everything
    if isinstance(asked, str):
        return named(layers + outside + (of_experts if experts.speaks_of_experts(asked) else []), asked)
    found, others = experts.named_experts(of_experts, asked)
    rest = [name for name in others if name != ALL_LINEAR]
    for name in rest if of_experts else ():
        if name in experts.PROJECTIONS and not any(path.endswith(f".{name}") for path in layers):
            what = f"target_modules: no layer of this model is called {name!r}, only its experts have it"
            raise UserError(what, hint=f"name {experts.EXPERTS}.{name}, or {experts.EXPERTS} for all of theirs")
    return (everything if ALL_LINEAR in others else []) + (named(layers + outside, tuple(rest)) if rest else []) + found


def _marked(modules: Mapping[str, Target]) -> dict[str, Target]:
    """With linear layers marked that peft would take for projections of the experts."""
    mixture = any(target.kind == "experts" for target in modules.values())
    alike = {name for name in modules if mixture and name.rpartition(".")[2] in experts.PROJECTIONS}
    return {n: replace(t, beside_experts=True) if n in alike and t.kind == "linear" else t for n, t in modules.items()}


def last_layers(names: Iterable[str], config: RunConfig) -> set[int]:
    """The numbers of the layers that `num_layers` speaks of, of those that stand in `names`.

    Raises:
        UserError: more than there are.
    """
    layers = sorted({int(found[1]) for name in names if (found := LAYER.search(name))})
    if config.num_layers and config.num_layers > len(layers):
        raise UserError(f"num_layers = {config.num_layers}: the model has {len(layers)}", hint="leave it out for all")
    return set(layers[-config.num_layers :] if config.num_layers else layers)


def named(modules: Sequence[str], asked: str | tuple[str, ...]) -> list[str]:
    """The modules that a pattern for whole paths, or names and paths, mean.

    Raises:
        UserError: one of them means none.
    """
    if isinstance(asked, str):
        if found := [name for name in modules if re.fullmatch(asked, name)]:
            return found
        raise UserError(f"target_modules: {asked!r} matches no layer", hint=f"a path is such as {modules[0]}")
    known = sorted({name.rsplit(".", 1)[-1] for name in modules})
    for target in asked:
        if target not in known and target not in modules:
            hint = did_you_mean(target, known, f"it has {', '.join(known)}")
            raise UserError(f"target_modules: no layer of this model is called {target!r}", hint=hint)
    return [name for name in modules if name in asked or name.rsplit(".", 1)[-1] in asked]


def check_some(chosen: Chosen, config: RunConfig) -> Chosen:
    """Gives back what it is given; raises UserError where that is nothing."""
    if not chosen:
        what = f"target_modules = {config.target_modules} and num_layers = {config.num_layers}"
        raise UserError(f"{what} leave nothing to train", hint="the last layers have none of these modules: leave one out")
    return chosen


def check_targets(targets: Mapping[str, Target], tied: bool, config: RunConfig, head: str = HEAD) -> None:
    """Raises UserError for what a model or a kind of adapter cannot have. `head`: what the model calls it."""
    if head != HEAD and any(target.kind == "tied" for target in targets.values()):
        raise UserError(f"target_modules: embeddings that are the head too, which is called {head} here", hint="leave them out")
    if tied and HEAD in targets:
        raise UserError("target_modules: the head of this model is its embeddings", hint="name embed_tokens: it adapts both")
    embeddings = [name for name, target in targets.items() if target.kind in ("embedding", "tied")]
    if tied and embeddings and not embeddings[0].endswith("embed_tokens"):
        what = f"target_modules: embeddings that are the head too, and are called {embeddings[0]} here"
        raise UserError(what, hint="such an adapter could not be fused: leave them out")
    for name, target in sorted(targets.items()):
        if config.fine_tune_type == "dora" and target.kind != "linear":
            what = "the experts" if target.kind == "experts" else "the embeddings"
            raise UserError(f"fine_tune_type = dora is not there for {name}", hint=f"use lora, or leave {what} out")
    experts.check_whole(name for name, target in targets.items() if target.kind == "experts")


def scale_of(config: RunConfig) -> float:
    """What B A is multiplied by: alpha / rank, with rsLoRA alpha / sqrt(rank) (Kalajdzievski 2023)."""
    return config.alpha / (math.sqrt(config.rank) if config.use_rslora else config.rank)


def trained_shapes(targets: Mapping[str, Target], config: RunConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each trained array, by the name that PEFT gives it."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, target in sorted(targets.items()):
        if target.kind == "experts":
            sides = (target.count, config.rank, target.columns), (target.count, target.rows, config.rank)
            shapes |= {name + LORA_A: sides[0], name + LORA_B: sides[1]}
        elif target.kind == "linear":
            shapes |= {name + LORA_A: (config.rank, target.columns), name + LORA_B: (target.rows, config.rank)}
        else:
            shapes |= {name + EMBEDDING_A: (config.rank, target.rows), name + EMBEDDING_B: (target.columns, config.rank)}
        if config.fine_tune_type == "dora":
            shapes[name + MAGNITUDE] = (target.rows,)
    return shapes


def initial_adapter(targets: Mapping[str, Target], config: RunConfig, norms: Norms | None = None) -> dict[str, np.ndarray]:
    """A uniform in +-1/sqrt(in), B zero, so that training starts at the base model (LoRA: Hu et al. 2021; A as PEFT draws it).

    Of embeddings it is A that is zero and B that is drawn from a normal distribution, as in PEFT. `norms` is asked where DoRA
    (Liu et al. 2024) needs the lengths of rows.
    """
    random = np.random.default_rng(config.seed)
    arrays = {}
    for name, shape in trained_shapes(targets, config).items():
        if name.endswith(LORA_A):
            bound = 1 / np.sqrt(shape[-1])
            arrays[name] = random.uniform(-bound, bound, shape).astype(np.float32)
        elif name.endswith(EMBEDDING_B):
            arrays[name] = random.standard_normal(shape).astype(np.float32)
        elif name.endswith(MAGNITUDE):
            assert norms is not None
            arrays[name] = norms(name.removesuffix(MAGNITUDE))
        else:
            arrays[name] = np.zeros(shape, np.float32)
    return arrays


def peft_tensors(arrays: Mapping[str, np.ndarray], targets: Mapping[str, Target]) -> dict[str, np.ndarray]:
    """`adapter_model.safetensors` of trained arrays. What adapts tied embeddings stands there for the head too."""
    tensors = {PEFT_PREFIX + name: array for name, array in experts.to_peft(arrays).items()}
    for name, target in targets.items():
        if target.kind == "tied":
            tensors[PEFT_PREFIX + HEAD + LORA_A] = np.ascontiguousarray(arrays[name + EMBEDDING_B].T)
            tensors[PEFT_PREFIX + HEAD + LORA_B] = np.ascontiguousarray(arrays[name + EMBEDDING_A].T)
    return tensors


def peft_config(targets: Mapping[str, Target], config: RunConfig, base: str) -> dict[str, Any]:
    """`adapter_config.json` with explicit paths, which peft matches exactly."""
    tied = any(target.kind == "tied" for target in targets.values())
    of_experts = experts.parameters_of(name for name, target in targets.items() if target.kind == "experts")
    # peft takes such a layer's name for the experts', but not that of its weight; it has no DoRA of weights named so
    alike = {name for name, target in targets.items() if target.beside_experts and config.fine_tune_type == "lora"}
    modules = [name for name, target in targets.items() if target.kind != "experts" and name not in alike]
    parameters = sorted([*of_experts, *(f"{name}.weight" for name in alike)])
    more: dict[str, Any] = {"target_parameters": parameters, "lora_dropout": 0.0} if parameters else {}
    more |= experts.patterns_of(of_experts, config.rank, config.alpha, config.use_rslora)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted([*modules, HEAD] if tied else modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": config.fine_tune_type == "dora",
        "use_rslora": config.use_rslora,
    } | more
