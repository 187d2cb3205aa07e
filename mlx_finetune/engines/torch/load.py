"""A Hugging Face folder as a frozen model of transformers, quantised where that is asked for."""

import importlib.util
import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mlx_finetune.config import RunConfig
from mlx_finetune.engines.torch.device import half_of
from mlx_finetune.errors import REFUSALS, UserError, no_memory
from mlx_finetune.files import read_json
from mlx_finetune.models.config_checks import check_config
from mlx_finetune.models.mpt_config import check_mpt
from mlx_finetune.models.quiet import quietly
from mlx_finetune.own_code import refuse_own_code


def load_model(folder: Path, config: RunConfig, device: str) -> PreTrainedModel:
    """Evaluated and frozen, on `device`.

    Raises:
        UserError: transformers cannot load it or would compute it otherwise, or tensors are missing or too many.
    """
    settings = read_json(folder / "config.json")
    check_config(settings, f"{folder / 'config.json'}")
    check_mpt(settings)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    dtype = "float32" if config.fine_tune_type == "full" else config.dtype if config.dtype != "auto" else half_of(device)
    how = _quantised(config, dtype, device) | ({"attn_implementation": "flash_attention_2"} if config.attention == "flash" else {})
    try:
        with quietly():
            model, found = auto_class(folder).from_pretrained(
                folder, dtype=getattr(torch, dtype), trust_remote_code=False, local_files_only=True, output_loading_info=True, **how
            )
    except (OSError, ImportError, StrictDataclassError, *REFUSALS) as error:
        if no_memory(error):
            raise
        refuse_own_code(folder, "model", error)
        reason = " ".join(str(error).split())[:160]
        hint = "see that the folder is complete, and that this transformers knows the architecture"
        raise UserError(f"{folder}: transformers cannot load this model: {reason}", hint=hint) from error
    if found["missing_keys"] or found["unexpected_keys"]:
        keys = sorted(found["missing_keys"])[:2] + sorted(found["unexpected_keys"])[:2]
        raise UserError(
            f"{folder}: weights do not fit the model: {', '.join(map(str, keys))}", hint="see that the folder is complete"
        )
    # Quantised it is there already; where it is cut over processes, it is moved as it is cut.
    model = (model if config.quantization != "none" or config.fsdp else model.to(device)).requires_grad_(False).eval()
    if config.quantization != "none":
        _keep_as_packed(model)
    # Padding is never learned from; a token that is also used for padding, such as an end of turn, learns like any other.
    model.get_input_embeddings().padding_idx = None
    if config.use_liger_kernel:
        _use_liger(model)
    return model


def auto_class(folder: Path) -> Any:
    """transformers' own choice of a class; of models that see and that it does not open as a text model, the whole one.

    Raises:
        KeyError, OSError, ValueError: as transformers' reading of config.json.
    """
    with quietly():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    alone = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if sees and not alone else AutoModelForCausalLM


def _quantised(config: RunConfig, dtype: str, device: str) -> dict[str, Any]:
    if config.quantization == "none":
        return {}
    if importlib.util.find_spec("accelerate") is None:
        raise UserError(f"quantization = {config.quantization} needs accelerate", hint="pip install 'mlx-finetune[qlora]'")
    if config.quantization == "8bit":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it tells of each cast in each layer
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    return {"quantization_config": how, "device_map": {"": torch.cuda.current_device() if device == "cuda" else device}}


def _keep_as_packed(model: PreTrainedModel) -> None:
    """In evaluation bitsandbytes packs weights anew on some CPUs, and multiplies in bfloat16 from there on."""
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            module.training = True


def _use_liger(model: PreTrainedModel) -> None:
    """Norms, rotations and gates; the loss stays ours, which needs no logits either."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known

    if model.config.model_type not in known:
        raise UserError(f"use_liger_kernel: not there for {model.config.model_type}", hint="leave it out")
    losses = ("cross_entropy", "fused_linear_cross_entropy")
    takes = inspect.signature(known[model.config.model_type]).parameters
    known[model.config.model_type](model=model, **{name: False for name in losses if name in takes})
