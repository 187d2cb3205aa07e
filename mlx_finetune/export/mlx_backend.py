"""As `backends`, in MLX: where torch or peft is not installed, and of adapters that mlx-lm made."""

import gc
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.engines.experts import PARTS, expert_deltas
from mlx_finetune.export.adapter import Adapter, Pair, read_adapter
from mlx_finetune.export.backends import Rows, Stored, Tokens, beginnings, distances_of, load_transformers, lost_keys, rounded_as
from mlx_finetune.export.changes import is_full
from mlx_finetune.export.distance import Measured, VerificationError, distance
from mlx_finetune.export.from_mlx import is_mlx_adapter
from mlx_finetune.export.mlx_adapter import open_in_mlx_lm
from mlx_finetune.export.rows import HEAD_WEIGHT
from mlx_finetune.files import read_json
from mlx_finetune.models.weights import SINGLE, read_float32, tensor_headers


def in_mlx(model: Path, checkpoint: Path, fused: Path, tokens: Tokens, stored: Stored, answers: Sequence[int]) -> Measured:
    """Base + checkpoint: the adapter added to, or the trained weights put among, the weights that MLX loaded.

    An adapter of mlx-lm is opened by mlx-lm.
    """
    from mlx_finetune.engines.mlx.load import load_model

    network = load_model(model, "float32")
    base = list(mlx_logits(network, tokens))
    if is_mlx_adapter(checkpoint):
        network = _open_in_mlx_lm(network, checkpoint)
    elif is_full(checkpoint):
        _train_mlx(network, checkpoint, model)
    else:
        _add_to_mlx(network, checkpoint, model)
    rows = _answer_mlx(network, tokens, answers)
    reference = list(mlx_logits(network, rows))
    _round_mlx(network, stored, model)
    rounded = list(mlx_logits(network, rows))
    del network
    gc.collect()  # one model in memory at a time
    found = list(mlx_logits(load_model(fused, "float32"), rows))
    gc.collect()
    from_base = distance(beginnings(reference, tokens), base)
    return Measured(distances_of(tokens, reference, rounded, found, from_base, lost(model, fused)), rows, reference, found)


def lost(model: Path, fused: Path) -> tuple[list[str], list[str]]:
    """Tensors missing from the fused folder, and too many; as transformers opens both where torch is installed."""
    if find_spec("torch"):
        return lost_keys(load_transformers(fused)[1], load_transformers(model)[1])
    names = [set(tensor_headers(folder)) for folder in (model, fused)]
    return sorted(names[0] - names[1]), sorted(names[1] - names[0])


def _open_in_mlx_lm(network: Any, adapter: Path) -> Any:
    """The network with the adapter in its float32 weights, opened and fused by mlx-lm, whose layers add it to what they give."""
    from mlx.utils import tree_unflatten

    network = open_in_mlx_lm(network, adapter)
    fused = [(path, module.fuse()) for path, module in network.named_modules() if hasattr(module, "fuse")]
    if fused:
        network.update_modules(tree_unflatten(fused))
    network.eval()
    return network


def _answer_mlx(network: Any, tokens: Tokens, answers: Sequence[int]) -> Rows:
    """Each row and the greedy tokens behind it."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    rows = [list(row) for row in tokens]
    for row, count in zip(rows, answers, strict=True):
        cache, fresh = make_prompt_cache(network), row
        for _ in range(count):
            row.append(int(np.array(network(mx.array([fresh]), cache=cache)[0, -1].astype(mx.float32)).argmax()))
            fresh = row[-1:]
    return rows


def mlx_logits(network: Any, tokens: Tokens) -> Iterator[np.ndarray]:
    """float32 [T, V] of each row."""
    import mlx.core as mx

    for row in tokens:
        yield np.array(network(mx.array([row]))[0].astype(mx.float32))


def _add_to_mlx(network: Any, checkpoint: Path, model: Path) -> None:
    """Adds the adapter to the loaded float32 weights, module by module and expert by expert."""
    import mlx.core as mx

    adapter, paths = read_adapter(checkpoint), mlx_paths(network, model)
    for module, pair in adapter.pairs.items():
        weight = _mlx_weight(network, f"{paths.get(module, module)}.weight")
        if weight is not None:
            _put_into_mlx(network, f"{paths.get(module, module)}.weight", mx.array(_tuned(np.array(weight), pair), mx.float32))
    for parameter, name, delta in _of_experts(adapter):
        path = parameter.rpartition(".")[0]
        at = f"{paths[f'{path}.{name}']}.weight"
        _put_into_mlx(network, at, _mlx_weight(network, at) + mx.array(delta))


def _of_experts(adapter: Adapter) -> Iterator[tuple[str, str, np.ndarray]]:
    """Parameter, projection, and what is added to it of all experts [E, out, in]."""
    for parameter, of in adapter.of_experts.items():
        a, b = read_float32(of.a), read_float32(of.b)
        every = [expert_deltas(parameter, a, b, of.pair, expert) for expert in range(len(a) // of.pair.rank)]
        for name in PARTS[parameter.rpartition(".")[2]]:
            yield parameter, name, np.stack([one[name] for one in every])


def mlx_paths(network: Any, model: Path) -> dict[str, str]:
    """Of each module and each projection of experts, by the name that PEFT gives it, its path in the network."""
    from mlx_finetune.engines.mlx.experts import projections
    from mlx_finetune.models.mlx_config import names_of
    from mlx_finetune.models.tensor_names import transformers_name

    names = names_of(read_json(model / "config.json"))
    paths = {transformers_name(path, names): path for path, _ in network.named_modules()}
    return paths | {name: path for name, path, _ in projections(network, names)}


def _tuned(weight: np.ndarray, pair: Pair) -> np.ndarray:
    """A weight with its module's matrices."""
    a, b = read_float32(pair.a), read_float32(pair.b)
    summed: np.ndarray = weight + np.float32(pair.scale) * ((b @ a).T if pair.on_embeddings else b @ a)
    if pair.magnitude is None:
        return summed
    longer: np.ndarray = summed * (read_float32(pair.magnitude) / np.linalg.norm(summed, axis=1))[:, None]
    return longer


def _train_mlx(network: Any, checkpoint: Path, model: Path) -> None:
    import mlx.core as mx

    trained: Any = mx.load(str(checkpoint / SINGLE))
    paths = mlx_paths(network, model)
    for stored, value in trained.items():
        module, _, leaf = stored.rpartition(".")
        name = f"{paths.get(module, module)}.{leaf}"
        if _mlx_weight(network, name) is not None:
            _put_into_mlx(network, name, value.astype(mx.float32))


def _round_mlx(network: Any, stored: Stored, model: Path) -> None:
    """The weights as the fused folder must store them, rounded by MLX; norms without the 1 that a class adds to them."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_finetune.engines.mlx.load import empty_model
    from mlx_finetune.engines.mlx.pullback import shifted

    kinds = {"BF16": mx.bfloat16, "F16": mx.float16}
    weights = dict(tree_flatten(network.parameters()))
    for name, dtype in rounded_as(stored, {name: weight.ndim for name, weight in weights.items()}).items():
        _put_into_mlx(network, name, weights[name].astype(kinds[dtype]).astype(mx.float32))
    shapes = {name: location.shape for name, location in tensor_headers(model).items()}
    if not any(len(shapes[name]) == 1 for name in stored):
        return
    for name, (tensor, added) in shifted(lambda: empty_model(model), shapes).items():
        if tensor in stored and name in weights:
            _put_into_mlx(network, name, (weights[name] - added).astype(kinds[stored[tensor]]).astype(mx.float32) + added)


def _mlx_weight(network: Any, name: str) -> Any:
    """None for the head of a network whose embeddings are its head."""
    from mlx.utils import tree_flatten

    weights = dict(tree_flatten(network.parameters()))
    if name not in weights and name != HEAD_WEIGHT:
        raise VerificationError(f"{name}: MLX has no weight of this name to compare")
    return weights.get(name)


def _put_into_mlx(network: Any, name: str, value: Any) -> None:
    import mlx.core as mx

    mx.eval(value)
    network.load_weights([(name, value)], strict=False)
