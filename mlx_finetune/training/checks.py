"""What is looked at before a model is loaded, and before it is trained: settings, engine, and names that can be handed back."""

from pathlib import Path
from typing import Any

from mlx_finetune.config import RunConfig
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.engines import Engine
from mlx_finetune.engines.experts import stored_at
from mlx_finetune.engines.supported import check_settings as check_settings_of
from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.models.hub import check_model_folder
from mlx_finetune.models.mlx_config import check_supported, max_exact_length, names_of
from mlx_finetune.models.quantised_sources import packed_by
from mlx_finetune.models.tensor_names import names_in_files, tensor_of, transformers_name
from mlx_finetune.models.weights import tensor_headers
from mlx_finetune.training.manifest import read_progress
from mlx_finetune.training.start import adapter_id

# What may differ when a run goes on: where things stand, what computes, and when to look.
MAY_CHANGE = frozenset({"model", "data", "out", "engine", "device", "dtype", "quantization", "eval_every", "save_every"}) | {
    "grad_checkpoint", "attention", "share_prefixes", "pack_length", "cache_trunk", "torch_compile", "use_liger_kernel", "fsdp",
    "patience", "keep", "sample_prompts", "sample_tokens", "report_to",
}  # fmt: skip


def check_settings(checkpoint: Path, config: RunConfig) -> None:
    """Raises UserError where config.yaml was edited after the checkpoint was written."""
    progress = read_progress(checkpoint)
    then, now = progress.get("config") or {}, config.to_dict()
    for name in now:
        if name not in then or then[name] == now[name]:
            continue
        another = name == "adapter_path" and adapter_id(now[name]) != progress.get("adapter")
        if another or not may_change(name, then[name], now[name]):
            hint = f"put {name}: {then[name]} back into config.yaml, or start a new run"
            raise UserError(f"{checkpoint}: trained with {name} {then[name]!r}, config.yaml says {now[name]!r}", hint=hint)


def may_change(name: str, then: Any, now: Any) -> bool:
    """Whether a run may go on with another value of the setting; of another place of an adapter its origin has to be the same."""
    if name == "adapter_path":
        return bool(then and now)
    return name in MAY_CHANGE or (name == "optimizer" and {then, now} <= {"adamw", "adamw_8bit"})  # the same moments


def check_engine(config: RunConfig, engine: str) -> None:
    """Raises UserError for a setting that `engine` does not have, or a device that is not there: nothing is loaded yet."""
    check_settings_of(config, engine)
    if engine == "torch":
        from mlx_finetune.engines.torch.device import check_device

        check_device(config)


def why_on_the_cpu(config: RunConfig) -> str | None:
    """In a sentence, where a run of the torch engine was told no device."""
    if config.engine != "torch" or config.device != "auto":
        return None
    from mlx_finetune.engines.torch.device import without_cuda

    reason = without_cuda()
    return f"computes on the CPU: {reason}" if reason else None


def layers_of(model: Path) -> int:
    """How many layers a model folder says that it has."""
    check_model_folder(model)
    found = read_json(model / "config.json")
    found |= found.get("text_config") or {}
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if found.get(name) is not None:
            return int(found[name])
    raise UserError(f"{model}/config.json: it does not say how many layers there are", hint="leave adapter_path out")


def check_mlx(model: Path, dataset: Dataset) -> None:
    """Raises UserError where MLX would compute something else than transformers: another architecture, or beyond a window."""
    architecture = read_json(model / "config.json")
    check_supported(architecture)
    if method := packed_by(architecture):
        raise UserError(
            f"{model}: its weights are packed by {method}", hint=f"mlx-finetune convert {model} --out DIR keeps its 4 bits"
        )
    longest, exact = max(dataset.train.lengths + dataset.valid.lengths), max_exact_length(architecture)
    if exact is not None and longest > exact:
        raise UserError(
            f"{dataset.folder}: an example of {longest} tokens; with MLX {model} is exact up to {exact} (its sliding window)",
            hint=f"prepare with --max-length {exact}, or train with --engine torch",
        )


def check_names(engine: Engine, model: Path) -> None:
    """Raises UserError where an adapted module is not a tensor of the checkpoint: its adapter could not be handed back."""
    headers, config = tensor_headers(model), read_json(model / "config.json")
    quantised = any(tensor.dtype == "U32" for tensor in headers.values())
    if quantised and config.get("quantization"):  # in the layout of mlx-lm's class
        names = names_of(config)
        headers = {transformers_name(name, names): tensor for name, tensor in headers.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in headers.items()}
    for name, target in engine.targets.items():
        if target.kind == "experts":
            at = (stored_at(shapes, one, target.count - 1, target.rows, target.columns) for one in names_in_files(name))
            if quantised or any(at):
                continue
        tensor = headers.get(tensor_of(name, headers))
        if tensor is None or (tensor.dtype in ("F32", "F16", "BF16") and tuple(tensor.shape) != (target.rows, target.columns)):
            raise UserError(
                f"{name}: not a tensor of that name and shape in {model}, so a tuned model could not be handed back",
                hint="this architecture comes later; name other target_modules",
            )
