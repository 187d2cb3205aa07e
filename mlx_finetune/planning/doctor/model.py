"""One model: is it here and whole, does its chat template take what gptme sends, does it fit, which engines train it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_finetune.config import default
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.models.hub import HUB_ID, check_model_folder, folder_in_cache, model_folder
from mlx_finetune.models.mlx_config import check_supported, text_config
from mlx_finetune.planning.advice import Wanted, choose, gb, needed
from mlx_finetune.planning.doctor.engines import machine_here
from mlx_finetune.planning.doctor.findings import Finding, State
from mlx_finetune.planning.machine import Machine
from mlx_finetune.planning.memory import LEARNED_SHARE
from mlx_finetune.planning.model_shape import model_shape


def model_findings(name: str, engine: str) -> Iterator[Finding]:
    """All of the model; `engine`: the one that `auto` takes. Nothing is downloaded."""
    folder = folder_here(name)
    if folder is None:
        advice = f"its sizes without downloading it: mlx-finetune plan --model {name}; to have it here: hf download {name}"
        yield Finding("model", "note", f"{name}: not on this machine, and no network is used here", advice)
        return
    try:
        check_model_folder(folder)
    except UserError as error:
        if Path(name).expanduser().exists():
            yield Finding("model", "fails", error.message, error.hint)
        else:
            advice = f"the rest of it: hf download {name}; where that says that it has all: {error.hint}"
            yield Finding("model", "note", f"{name}: only partly on this machine ({error.message})", advice)
        return
    config = read_json(folder / "config.json")
    yield Finding("model", "ok", f"{name}: {text_config(config).get('model_type')}, whole (headers and settings; weights not read)")
    yield from template_findings(folder)
    yield from trained_by(config, engine)
    yield fits(str(folder), machine_here()[0])


def folder_here(name: str) -> Path | None:
    """The folder that is meant, or of the Hub's cache; None where a hub id is not in it.

    Raises:
        UserError: neither a folder nor a hub id.
    """
    local = Path(name).expanduser()
    if local.exists() or not HUB_ID.fullmatch(name):
        return model_folder(name)
    return folder_in_cache(name)


def template_findings(folder: Path) -> Iterator[Finding]:
    """What `prepare` would say of the chat template, which is asked with a chat as gptme sends it."""
    try:
        template = ChatTemplate.load(folder)
    except UserError as error:
        yield Finding("chat template", "fails", error.message, error.hint)
        return
    if template.why.startswith("no policy helps"):
        yield Finding("chat template", "fails", template.why, "choose another model: this template loses what gptme sends")
        return
    yield Finding("chat template", "ok", "takes chats as gptme sends them")
    for line in template.remarks:
        yield Finding("chat template", "note", line.strip())


def trained_by(config: dict[str, Any], engine: str) -> Iterator[Finding]:
    """Of the two engines those that know the architecture, installed or not."""
    refusals = {"mlx": _mlx_refusal(config), "torch": _torch_refusal(config)}
    able = [name for name, refusal in refusals.items() if not refusal]
    for name, refusal in refusals.items():
        if not refusal:
            yield Finding(f"trained by {name}", "ok", "yes" + (", which auto takes" if name == engine else ""))
        elif name == engine:
            state: State = "note" if able else "fails"
            yield Finding(
                f"trained by {name}", state, f"no: {refusal}", f"train --engine {able[0]}" if able else "choose another model"
            )
        else:
            yield Finding(f"trained by {name}", "ok", f"no: {refusal}; auto takes {engine}")


def _mlx_refusal(config: dict[str, Any]) -> str:
    try:
        check_supported(config)
    except UserError as error:
        return error.message
    return ""


def _torch_refusal(config: dict[str, Any]) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TEXT
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SEEING

    kinds = str(config.get("model_type")), str(text_config(config).get("model_type"))
    if config.get("quantization"):
        return "its weights are quantised by MLX"
    return "" if any(kind in TEXT or kind in SEEING for kind in kinds) else f"this transformers does not know {kinds[0]}"


def fits(name: str, machine: Machine) -> Finding:
    """What `plan` would say in one line."""
    try:
        shape = model_shape(name)
    except UserError as error:
        return Finding("fits", "note", f"not known beforehand: {error.message}", error.hint)
    choice = choose(shape, machine, Wanted(default("max_length"), LEARNED_SHARE))
    d, most = choice.dials, min(default("max_length"), shape.sizes.longest or default("max_length"))
    told = f"{gb(needed(choice.memory))} of {gb(machine.usable)} with {d.bits} bits a weight and windows of {d.max_length:,} tokens"
    if not choice.fits:
        return Finding("fits", "fails", f"no: needs {told}", "take a smaller model: mlx-finetune plan says which fits")
    given_up = d.bits < min(16, shape.stored_bits) or d.max_length < most or d.num_layers
    advice = f"with these settings: mlx-finetune plan --model {name} --write plan.yaml" if given_up else ""
    return Finding("fits", "note" if given_up else "ok", f"yes: needs {told}", advice)
