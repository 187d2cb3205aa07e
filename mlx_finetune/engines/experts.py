"""Experts of a mixture: how their adapters lie in a checkpoint, and where their weights stand in an original one. Numpy only.

An engine holds A [experts, rank, in] and B [experts, out, rank] of each projection, as PATH.gate_proj.lora_A.weight and the like;
PATH is where transformers 5 has the experts, such as model.layers.0.mlp.experts. There gate and up are one parameter, and peft
(`target_parameters`) has one pair of matrices for a parameter:

    A [experts * R, in], expert after expert; B [out, R * experts], column r * experts + e of which is column r of expert e.

Of gate_up_proj R is twice the rank: A of gate stands above that of up, and B is zero but for their two blocks. Where both
parameters are adapted, that of gate_up_proj is called PATH.base_layer.lora_A.weight, and that of down_proj PATH.lora_A.weight.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_finetune.errors import UserError

EXPERTS = "experts"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
GATE_UP, DOWN = "gate_up_proj", "down_proj"  # parameters of transformers 5
PARTS = {GATE_UP: ("gate_proj", "up_proj"), DOWN: ("down_proj",)}
SIDES = (".lora_A.weight", ".lora_B.weight")
OF_ENGINE = re.compile(rf"(.*\b{EXPERTS})\.({'|'.join(PROJECTIONS)})(\.lora_[AB]\.weight)")
OF_PEFT = re.compile(rf"(.*\b{EXPERTS})(\.base_layer)?\.lora_A\.weight")
PATTERN = rf"{EXPERTS}\.{GATE_UP}"  # of rank_pattern and alpha_pattern: a regular expression for the end of a path
OLD_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # of mixtral's kind

# Model types whose other layers called gate_proj and the like peft 0.21 takes for the experts', of those that mlx-lm has.
MISREAD = frozenset(
    {"afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe", "glm4_moe_lite"}
    | {"longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next"}
)


@dataclass(frozen=True)
class Pair:
    """A and B of a parameter of the experts, by their names in a checkpoint."""

    a: str
    b: str
    rank: int  # R, of one expert
    scale: float  # B A of an expert is multiplied by it


def speaks_of_experts(asked: str | tuple[str, ...]) -> bool:
    """Whether `target_modules` names experts: a pattern in which the word stands, or one of several names."""
    return bool(re.search(rf"\b{EXPERTS}\b", asked)) if isinstance(asked, str) else any(map(_is_of_experts, asked))


def named_experts(paths: Iterable[str], names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those of `paths` that `names` mean, and the names that are of something else: `experts` means all, `experts.up_proj` one.

    Raises:
        UserError: a name that means none.
    """
    known, found, others = list(paths), set[str](), []
    for name in names:
        means = {path for path in known if f".{name}." in f".{path}."}
        if not _is_of_experts(name):
            others.append(name)
        elif means:
            found |= means
        else:
            hint = f"experts are named {EXPERTS}, or {EXPERTS}.{' or .'.join(PROJECTIONS)}" if known else "leave it out"
            what = "" if known else "; this model has no experts that can be adapted"
            raise UserError(f"target_modules: no experts are called {name!r}{what}", hint=hint)
    return [path for path in known if path in found], others


def check_whole(paths: Iterable[str]) -> None:
    """Raises UserError where of some experts gate or up is adapted without the other."""
    known = set(paths)
    for path in sorted(known):
        module, _, name = path.rpartition(".")
        other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}.get(name)
        if other and f"{module}.{other}" not in known:
            what = f"target_modules: {EXPERTS}.{name} without {EXPERTS}.{other}, with which it is one parameter in transformers"
            raise UserError(what, hint="name both")


def check_dora(model_type: str, beside: Iterable[str]) -> None:
    """Raises UserError where peft would take DoRA of linear layers beside experts for theirs; LoRA is saved otherwise."""
    if model_type in MISREAD and (names := sorted(beside)):
        hint = "use lora, or adapt its attention: --set target_modules=q_proj,k_proj,v_proj,o_proj, or as they are called there"
        raise UserError(f"{model_type}: peft would read an adapter with DoRA on {names[0]} as one of the experts'", hint=hint)


def parameters_of(paths: Iterable[str]) -> list[str]:
    """`target_parameters` of peft for paths of projections."""
    whole = {name: parameter for parameter, names in PARTS.items() for name in names}
    return sorted({f"{path.rpartition('.')[0]}.{whole[path.rpartition('.')[2]]}" for path in paths})


def patterns_of(parameters: Iterable[str], rank: int, alpha: float, rslora: bool) -> dict[str, dict[str, float]]:
    """`rank_pattern` and `alpha_pattern` of peft by which a block of twice the rank is scaled as each of its halves."""
    if not any(name.endswith(f".{GATE_UP}") for name in parameters):
        return {}
    return {"rank_pattern": {PATTERN: 2 * rank}, "alpha_pattern": {PATTERN: alpha * (math.sqrt(2) if rslora else 2)}}


def to_peft(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by an engine's names -> those of a checkpoint, without PEFT's prefix; what is not of experts stays as it is."""
    tensors, experts = {}, dict[str, dict[str, np.ndarray]]()
    for name, array in arrays.items():
        if (match := OF_ENGINE.fullmatch(name)) and array.ndim == 3:
            experts.setdefault(match[1], {})[match[2] + match[3]] = array
        else:
            tensors[name] = array
    for path, own in experts.items():
        both = all(names[0] + SIDES[0] in own for names in PARTS.values())
        for parameter, names in PARTS.items():
            if names[0] + SIDES[0] in own:
                where = f"{path}.base_layer" if both and parameter == GATE_UP else path
                a, b = (_block([own[name + side] for name in names], side) for side in SIDES)
                count, rank, columns = a.shape
                tensors[where + SIDES[0]] = a.reshape(count * rank, columns)
                tensors[where + SIDES[1]] = np.ascontiguousarray(b.transpose(1, 2, 0)).reshape(-1, rank * count)
    return tensors


def pairs_of(names: Iterable[str], settings: Mapping[str, Any]) -> dict[str, Pair]:
    """The pairs of experts among the tensors of a checkpoint, by the parameter that they change; `settings`: adapter_config.json.

    Raises:
        UserError: a pair of which `target_parameters` does not tell what it changes.
    """
    known, told = set(names), settings.get("target_parameters") if isinstance(settings, Mapping) else None
    targets = [str(name) for name in told] if isinstance(told, list) else []
    pairs = {}
    for name in sorted(known):
        if not (match := OF_PEFT.fullmatch(name)):
            continue
        path = match[1]
        named = [p for p in PARTS if any(f".{path}.{p}".endswith(f".{target}") for target in targets)]
        nested = path + ".base_layer" + SIDES[0] in known
        means = [GATE_UP if match[2] else DOWN] if nested else named
        b = name.removesuffix(SIDES[0]) + SIDES[1]
        if len(means) != 1 or means[0] not in named or b not in known:
            hint = "save the adapter again with peft"
            raise UserError(f"{name}: target_parameters does not say what it changes, or B of it is missing", hint=hint)
        parameter = f"{path}.{means[0]}"
        pairs[parameter] = Pair(name, b, *rank_and_scale(parameter, settings))
    return pairs


def holds_experts(names: Iterable[str]) -> bool:
    """Whether there are pairs of experts among the tensors of a checkpoint."""
    return any(map(OF_PEFT.fullmatch, names))


def from_peft(tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The other way than `to_peft`, also of an adapter that peft trained, whose B is full: then gate and up each have all of A.

    Raises:
        UserError: matrices of other shapes than `settings`, of adapter_config.json, say.
    """
    arrays = dict(tensors)
    for parameter, pair in pairs_of(tensors, settings).items():
        a, b = unfolded(arrays.pop(pair.a), arrays.pop(pair.b), pair.rank, parameter)
        path, _, leaf = parameter.rpartition(".")
        names = PARTS[leaf]
        halves = [(a, half) for half in np.split(b, len(names), axis=1)]
        if len(names) == 2 and _is_block(b):
            middle = pair.rank // 2
            halves = [(a[:, :middle], halves[0][1][..., :middle]), (a[:, middle:], halves[1][1][..., middle:])]
        for name, both in zip(names, halves, strict=True):
            arrays |= {f"{path}.{name}{side}": np.ascontiguousarray(half) for side, half in zip(SIDES, both, strict=True)}
    return arrays


def rank_and_scale(module: str, settings: Mapping[str, Any]) -> tuple[int, float]:
    """Of a module or a parameter, from adapter_config.json; its patterns are matched as peft does.

    Raises:
        UserError: they are no numbers.
    """

    def of(patterns: Mapping[str, Any] | None, otherwise: Any) -> Any:
        return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)

    try:
        rank = int(of(settings.get("rank_pattern"), settings["r"]))
        alpha = float(of(settings.get("alpha_pattern"), settings["lora_alpha"]))
        return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, re.error) as error:
        said = f"adapter_config.json: rank and alpha of {module} are no numbers ({type(error).__name__}: {error})"
        raise UserError(said, hint="use a checkpoint folder of a finished save") from error


def expert_deltas(parameter: str, a: np.ndarray, b: np.ndarray, pair: Pair, expert: int) -> dict[str, np.ndarray]:
    """What the adapter adds to the matrices of one expert, by projection: float32 [out, in].

    `parameter`: a key of `pairs_of`; `a` and `b`: its tensors as the checkpoint has them.

    Raises:
        UserError: they have other shapes than `pair` says, or there is no such expert.
    """
    every_a, every_b = unfolded(a, b, pair.rank, parameter)
    if not 0 <= expert < len(every_a):
        raise UserError(f"{parameter}: no expert {expert}, it has {len(every_a)}", hint="give the model it was trained on")
    names = PARTS[parameter.rpartition(".")[2]]
    left = np.float32(pair.scale) * every_b[expert].astype(np.float32)
    delta = left @ every_a[expert].astype(np.float32)
    return dict(zip(names, np.split(delta, len(names)), strict=True))


@dataclass(frozen=True)
class Stored:
    """Where the matrix [rows, columns] of an expert stands in a checkpoint."""

    tensor: str
    expert: int | None = None  # its place in a tensor of all experts; None: it is a tensor of its own
    first: int = 0  # row in it


def stored_at(shapes: Mapping[str, tuple[int, ...]], path: str, expert: int, rows: int, columns: int) -> Stored | None:
    """The matrix of `expert` of `path` (as PATH.gate_proj) among the tensors of an original checkpoint; None: not among them.

    It is one tensor for each expert (transformers 4, and what transformers 5 saves), or those of all experts are one, as in
    transformers 5, in Granite's files, and in MLX's.
    """
    module, _, name = path.rpartition(".")
    modules = (module, re.sub(rf"\.mlp\.{EXPERTS}$", rf".block_sparse_moe.{EXPERTS}", module))
    for where in modules:
        for leaf in (name, OLD_NAMES[name]):
            if shapes.get(f"{where}.{expert}.{leaf}.weight") == (rows, columns):
                return Stored(f"{where}.{expert}.{leaf}.weight")
        switch = f"{where.removesuffix(EXPERTS)}switch_mlp.{name}.weight"
        if _holds(shapes.get(switch), expert, rows, columns):
            return Stored(switch, expert)
    both, parameter = (1, DOWN) if name == DOWN else (2, GATE_UP)
    granite = {GATE_UP: "input_linear.weight", DOWN: "output_linear.weight"}[parameter]
    for tensor in (f"{module}.{parameter}", module.removesuffix(EXPERTS) + granite):
        if _holds(shapes.get(tensor), expert, both * rows, columns):
            return Stored(tensor, expert, rows if name == "up_proj" else 0)
    return None


def _holds(shape: tuple[int, ...] | None, expert: int, rows: int, columns: int) -> bool:
    """Whether a tensor of that shape has a matrix [rows, columns] of so many experts."""
    return shape is not None and len(shape) == 3 and shape[1:] == (rows, columns) and expert < shape[0]


def _is_of_experts(name: str) -> bool:
    """`experts`, `experts.up_proj`, or a path that ends like that."""
    return bool(re.fullmatch(rf"(.*\.)?{EXPERTS}(\.({'|'.join(PROJECTIONS)}))?", name))


def _block(arrays: list[np.ndarray], side: str) -> np.ndarray:
    """One above the other of A; of B [experts, out, rank] the blocks of a matrix that is else zero."""
    if side == SIDES[0] or len(arrays) == 1:
        return np.concatenate(arrays, axis=1)
    zeros = np.zeros_like(arrays[0])
    return np.concatenate([np.concatenate([arrays[0], zeros], 2), np.concatenate([zeros, arrays[1]], 2)], axis=1)


def _is_block(b: np.ndarray) -> bool:
    rows, rank = b.shape[1] // 2, b.shape[2]
    middle = rank // 2
    return not rank % 2 and not b[:, :rows, middle:].any() and not b[:, rows:, :middle].any()


def unfolded(a: np.ndarray, b: np.ndarray, rank: int, parameter: str) -> tuple[np.ndarray, np.ndarray]:
    """A [experts, R, in] and B [experts, out, R] of what a checkpoint has."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] % rank or a.shape[0] != b.shape[1] or b.shape[0] % len(_parts(parameter)):
        said = f"{parameter}: A {list(a.shape)} and B {list(b.shape)} are not those of experts of rank {rank}"
        raise UserError(said, hint="use a checkpoint folder of a finished save")
    return a.reshape(-1, rank, a.shape[1]), b.reshape(len(b), rank, -1).transpose(2, 0, 1)


def _parts(parameter: str) -> tuple[str, ...]:
    return PARTS[parameter.rpartition(".")[2]]
