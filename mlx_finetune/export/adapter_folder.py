"""One folder with the adapter for peft (and what reads its files, such as vLLM) and for mlx-lm, proven before it appears.

peft passes over mlx-lm's three keys in adapter_config.json, and mlx-lm over peft's. mlx-lm keeps A^T as lora_a and B^T as lora_b,
and is given whole paths as `keys`: only those are adapted, in whatever layer.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from mlx_finetune.engines import experts
from mlx_finetune.engines.adapter import HEAD, LAYER, PEFT_PREFIX
from mlx_finetune.errors import UserError
from mlx_finetune.export.adapter import CONFIG, TENSORS, Adapter, Pair, read_adapter
from mlx_finetune.export.adapter_checks import Opened, check_readers
from mlx_finetune.export.card import write_card
from mlx_finetune.export.changes import base_weights, is_full
from mlx_finetune.export.facts import Facts, base_name
from mlx_finetune.export.folder_checks import TEMPLATE as TEMPLATE_FILE
from mlx_finetune.export.folder_checks import TOKENIZER_CONFIG, TOKENIZER_FILES
from mlx_finetune.export.fuse import write_template
from mlx_finetune.export.mlx_backend import mlx_paths
from mlx_finetune.export.report import write_report
from mlx_finetune.export.rows import HEAD_WEIGHT
from mlx_finetune.files import atomic_folder, read_json, write_json
from mlx_finetune.models.mlx_config import is_tied, text_config
from mlx_finetune.models.weights import TensorLocation, file_headers, read_float32, tensor_headers
from mlx_finetune.training.manifest import made_from

Format = Literal["peft", "mlx-lm"]
FORMATS: tuple[Format, ...] = ("peft", "mlx-lm")
MLX_TENSORS = "adapters.safetensors"
COPIED = ("LICENSE*", "NOTICE*", *TOKENIZER_FILES, TOKENIZER_CONFIG, TEMPLATE_FILE)
FUSE = "mlx-finetune fuse hands back the whole model"


@dataclass(frozen=True)
class Exported:
    """What was written. formats: the libraries that open it; remarks: what it is not for, and why."""

    formats: list[Format]
    modules: int
    bytes: int
    remarks: list[str]


def export_adapter(
    model: Path, checkpoint: Path, out: Path, to: Format, template: str = "", facts: Facts | None = None
) -> tuple[Exported, Opened]:
    """Writes the folder `out` for `to`, and for the other library too where that can have this adapter.

    `checkpoint`: of a run, whose engine is asked. `template`: the chat template that was trained. `facts`: for a model card.

    Raises:
        UserError: `out` exists; the checkpoint does not fit the model, or `to` cannot represent what it holds.
        VerificationError: a library makes other logits of the folder than the engine that trained; nothing is left.
    """
    if is_full(checkpoint):
        raise UserError(f"{checkpoint}: the weights themselves were trained, there is no adapter", hint=FUSE)
    adapter = read_adapter(checkpoint)
    headers, config = tensor_headers(model), read_json(model / "config.json")
    has_head = any(name.endswith(HEAD_WEIGHT) for name in headers)
    tied = is_tied(config) or not has_head
    quantised = "quantization" in config  # by MLX; of what others packed, such as mxfp4, the attention may be as it was
    if not quantised:
        base_weights(model, adapter)
    lacking = {"peft": _not_for_peft(model, adapter, tied, quantised), "mlx-lm": _not_for_mlx_lm(model)}
    if lacking[to]:
        other = next((name for name in FORMATS if not lacking[name]), None)
        raise UserError(f"{checkpoint}: {to} cannot have it: {lacking[to]}", hint=f"--to {other}" if other else FUSE)
    formats = [name for name in FORMATS if not lacking[name]]
    remarks = [f"not for {name}: {reason}" for name, reason in lacking.items() if reason]
    if "mlx-lm" in formats and config.get("rope_parameters") and "rope_theta" not in text_config(config):
        remarks.append(f"mlx-lm 0.32 does not read rope_parameters in config.json of {model.name}: give it a converted base")
    with atomic_folder(out) as folder:
        write_formats(folder, model, checkpoint, adapter, formats, tied, headers, facts)
        if template:
            write_template(folder, template)
        opened = check_readers(model, checkpoint, folder, formats)
        report = write_report(folder, asdict(opened), made_from(checkpoint))
        if facts is not None:
            write_card(folder, facts, report, "adapter")
        size = sum(path.stat().st_size for path in folder.iterdir())
    return Exported(formats, len(adapter.pairs), size, remarks), opened


def _not_for_peft(model: Path, adapter: Adapter, tied: bool, quantised: bool) -> str:
    if quantised:
        return f"{model.name} is quantised by MLX"
    on_embeddings = any(pair.on_embeddings for pair in adapter.pairs.values())
    return "on embeddings that are the head too, which its merge_and_unload changes twice" if tied and on_embeddings else ""


def _not_for_mlx_lm(model: Path) -> str:
    from mlx_finetune.engines.mlx.load import open_model

    try:
        open_model(model)
    except UserError as error:
        return error.message
    return ""


def write_formats(
    folder: Path,
    model: Path,
    checkpoint: Path,
    adapter: Adapter,
    formats: list[Format],
    tied: bool,
    headers: Mapping[str, TensorLocation],
    facts: Facts | None,
) -> None:
    """The adapter's files for each of `formats`, one adapter_config.json for all, and the tokenizer's."""
    own, settings = read_json(checkpoint / CONFIG), dict[str, Any]()
    if "peft" in formats:
        shutil.copyfile(checkpoint / TENSORS, folder / TENSORS)
        base = facts.base if facts else base_name("", model)[0]
        targets = own["target_modules"] if own.get("target_parameters") else plain_targets(set(adapter.pairs), headers)
        settings |= own | {"base_model_name_or_path": base, "target_modules": targets, "inference_mode": True}
    if "mlx-lm" in formats:
        from mlx_finetune.engines.mlx.load import empty_model

        paths = mlx_paths(empty_model(model), model)
        pairs = {paths.get(module, module): pair for module, pair in adapter.pairs.items() if not (tied and module == HEAD)}
        tensors = {name: array for module, pair in pairs.items() for name, array in _mlx_tensors(module, pair).items()}
        of_experts = _mlx_experts(checkpoint, adapter, own)
        for name, (a, b) in of_experts.items():
            tensors |= {f"{paths[name]}.lora_a": a, f"{paths[name]}.lora_b": b}
        save_file(tensors, folder / MLX_TENSORS, metadata={"format": "mlx"})
        settings |= _mlx_settings(adapter, sorted([*pairs, *(paths[name] for name in of_experts)]), own)
    write_json(folder / CONFIG, settings)
    for pattern in COPIED:
        for path in model.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _mlx_tensors(module: str, pair: Pair) -> dict[str, np.ndarray]:
    """lora_a [columns, r], lora_b [r, rows], of embeddings [rows, r] and [r, columns]; m [rows] of DoRA."""
    tensors = {f"{module}.lora_a": read_float32(pair.a).T, f"{module}.lora_b": read_float32(pair.b).T}
    if pair.magnitude is not None:
        tensors[f"{module}.m"] = read_float32(pair.magnitude)
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def _mlx_experts(checkpoint: Path, adapter: Adapter, own: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each projection of experts lora_a [E, r, in] and lora_b [E, out, r].

    Raises:
        UserError: an adapter of another rank than the others, as peft trains those of gate and up.
    """
    found = {}
    names = {name for of in adapter.of_experts.values() for name in (of.pair.a, of.pair.b)}
    stored = {
        name: location for name, location in file_headers(checkpoint / TENSORS).items() if name.removeprefix(PEFT_PREFIX) in names
    }
    arrays = experts.from_peft({name.removeprefix(PEFT_PREFIX): read_float32(at) for name, at in stored.items()}, own)
    for name, a in arrays.items():
        if name.endswith(experts.SIDES[0]):
            module = name.removesuffix(experts.SIDES[0])
            if a.shape[1] != own["r"]:
                raise UserError(
                    f"{checkpoint}: {module} has rank {a.shape[1]}, mlx-lm has one for all: {own['r']}", hint="--to peft"
                )
            found[module] = a, arrays[module + experts.SIDES[1]]
    return found


def _mlx_settings(adapter: Adapter, modules: list[str], own: Mapping[str, Any]) -> dict[str, Any]:
    """mlx-lm's keys. Its scale takes the place of alpha, with rsLoRA too. `num_layers` counts from the first adapted layer.

    It is not 0, which mlx-lm takes for all; and as `keys` are whole paths, they alone decide.
    """
    layers = {int(found[1]) for module in modules if (found := LAYER.search(module))}
    how = {"rank": int(own["r"]), "scale": adapter.scale, "dropout": float(own.get("lora_dropout") or 0.0), "keys": modules}
    kind = "dora" if own.get("use_dora") else "lora"
    return {"fine_tune_type": kind, "num_layers": max(layers) - min(layers) + 1 if layers else 1, "lora_parameters": how}


def plain_targets(modules: set[str], headers: Mapping[str, TensorLocation]) -> list[str]:
    """The last names of the modules where all that are called so are adapted, else their whole paths; peft matches either.

    With whole paths where there are experts, whose layers peft treats by their names.
    """
    matrices = {name.removesuffix(".weight") for name, at in headers.items() if name.endswith(".weight") and len(at.shape) == 2}
    names = {module.rpartition(".")[2] for module in modules}
    meant = {module for module in matrices if module.rpartition(".")[2] in names}
    return sorted(names) if meant == modules and not any(".experts." in name for name in headers) else sorted(modules)
