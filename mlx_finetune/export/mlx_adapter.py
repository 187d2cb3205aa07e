"""The folder of an adapter of mlx-lm: its settings, which tensors belong to which parameter, and how mlx-lm itself opens it."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json, write_json
from mlx_finetune.models.weights import ITEM_BYTES, TensorLocation, file_headers

CONFIG, TENSORS = "adapter_config.json", "adapters.safetensors"
KINDS = ("lora", "dora", "full")
FINISHED = "train it again, or name another adapter"
Parts = dict[str, TensorLocation]  # of a module: lora_a, lora_b, m; of a parameter trained itself: ""


def read_settings(path: Path) -> tuple[str, float]:
    """Kind, and what B A is multiplied by.

    Raises:
        UserError: settings that mlx-lm does not write.
    """
    config = read_json(path)
    config = config if isinstance(config, dict) else {}
    kind, how = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    scale = 1.0 if kind == "full" else how.get("scale") if isinstance(how, dict) else None
    if kind not in KINDS or isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise UserError(f"{path}: fine_tune_type {kind!r} with scale {scale!r} is no adapter of mlx-lm", hint=FINISHED)
    return kind, float(scale)


def read_parts(path: Path, kind: str) -> dict[str, Parts]:
    """Of each parameter of the model what the file holds.

    Raises:
        UserError: a broken file, a matrix without its other half, numbers of another kind than 16 or 32 bits.
    """
    found: dict[str, Parts] = {}
    for name, location in file_headers(path).items():
        module, _, leaf = name.rpartition(".")
        if location.dtype not in ITEM_BYTES:
            raise UserError(f"{path}: {name} is {location.dtype}, not one of {', '.join(ITEM_BYTES)}", hint=FINISHED)
        if kind == "full":
            found[name] = {"": location}
        elif leaf in ("lora_a", "lora_b", "m"):
            found.setdefault(f"{module}.weight", {})[leaf] = location
        else:
            raise UserError(f"{path}: {name} is no matrix of {kind}", hint=FINISHED)
    wanted = {"lora": {"lora_a", "lora_b"}, "dora": {"lora_a", "lora_b", "m"}, "full": {""}}[kind]
    for parameter, own in found.items():
        if own.keys() != wanted:
            raise UserError(f"{path}: {parameter} has {', '.join(sorted(own))} and not {', '.join(sorted(wanted))}", hint=FINISHED)
    if not found:
        raise UserError(f"{path}: no tensors", hint=FINISHED)
    return found


def open_in_mlx_lm(network: Any, adapter: Path, evaluated: bool = True) -> Any:
    """The network with the adapter's layers, whose numbers are made float32, as mlx-lm opens it.

    An adapter of an older mlx-lm is told to it in today's words. `evaluated`: else only names and shapes are known to be right.

    Raises:
        UserError: mlx-lm does not open it.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import load_adapters

    with TemporaryDirectory() as folder:
        _write_todays(adapter, Path(folder))
        try:
            network = load_adapters(network, folder)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            said = " ".join(str(error).replace(folder, str(adapter)).split())[:240]
            raise UserError(f"{adapter}: mlx-lm does not open it: {said}", hint=FINISHED) from error
        if evaluated:
            weights, names = dict(tree_flatten(network.parameters())), file_headers(adapter / TENSORS)
            wide = [(name, weights[name].astype(mx.float32)) for name in names]
            mx.eval([array for _, array in wide])
            network.load_weights(wide, strict=False)
    return network


def _write_todays(adapter: Path, folder: Path) -> None:
    """Older ones say lora_layers for num_layers, and have A of experts as [E r, in]."""
    import mlx.core as mx

    config = read_json(adapter / CONFIG)
    how = config.get("lora_parameters")
    config["num_layers"] = config.get("num_layers", config.get("lora_layers", -1))
    write_json(folder / CONFIG, config | ({"lora_parameters": {"dropout": 0.0} | how} if isinstance(how, dict) else {}))
    shapes = {name: location.shape for name, location in file_headers(adapter / TENSORS).items()}
    pairs = [(name, f"{name.removesuffix('lora_a')}lora_b") for name in shapes if name.endswith("lora_a")]
    flat = {a: shapes[b][0] for a, b in pairs if len(shapes[a]) == 2 and len(shapes.get(b, ())) == 3}
    if not flat:
        (folder / TENSORS).symlink_to((adapter / TENSORS).absolute())
        return
    arrays: Any = mx.load(str(adapter / TENSORS))
    arrays |= {name: arrays[name].reshape(experts, -1, shapes[name][1]) for name, experts in flat.items()}
    mx.save_safetensors(str(folder / TENSORS), arrays)
