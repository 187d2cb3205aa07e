"""What an engine does not have, refused by name before anything is loaded. Neutral: no framework is imported."""

import importlib.util
import shutil
from collections.abc import Iterator
from typing import Any

from mlx_finetune.config import RunConfig, default
from mlx_finetune.errors import UserError
from mlx_finetune.launched import launched

# What only one engine has: setting, values it does not know (None: all but the default), and what to do there.
LACKS: dict[str, tuple[tuple[str, tuple[Any, ...] | None, str], ...]] = {
    "mlx": (
        ("device", None, "MLX takes Metal where it is; device is of the torch engine"),
        ("quantization", None, "name a model that MLX quantised, or use --engine torch"),
        ("optimizer", ("adamw_8bit",), "use adafactor, which keeps less than adamw too"),
        ("attention", ("flash",), "leave it out"),
        ("torch_compile", None, "leave it out"),
        ("use_liger_kernel", None, "leave it out"),
        ("fsdp", None, "leave it out"),
    ),
    "torch": (
        ("attention", ("blocks",), "leave it out, or use --engine mlx"),
        ("cache_trunk", None, "leave it out, or use --engine mlx"),
    ),
}
# Settings that have nothing to act on where the weights themselves are trained.
OF_ADAPTERS = ("rank", "alpha", "dropout", "use_rslora", "loraplus_lr_ratio", "adapter_path", "quantization", "fsdp")
PACKAGES = (  # setting, value, package, and the extra that brings it
    ("quantization", ("4bit", "8bit"), "bitsandbytes", "qlora"),
    ("optimizer", ("adamw_8bit",), "bitsandbytes", "qlora"),
    ("use_liger_kernel", (True,), "liger_kernel", "liger"),
    ("attention", ("flash",), "flash_attn", "flash"),
)

COMPILERS = ("g++", "clang++", "c++")


def check_settings(config: RunConfig, engine: str) -> None:
    """Raises UserError, by name, for what `engine` does not have, what does not go together, and what is not installed."""
    for name, hint in _lacking(config, engine):
        raise UserError(f"{name} = {_said(getattr(config, name))} is not there with the {engine} engine", hint=hint)
    if config.fine_tune_type == "full":
        for name in OF_ADAPTERS:
            if getattr(config, name) != default(name):
                raise UserError(f"{name} is for adapters, and fine_tune_type = full trains the weights", hint="leave one out")
        if config.dtype not in ("auto", "float32"):
            raise UserError(
                f"fine_tune_type = full trains in float32, not {config.dtype}",
                hint="leave dtype out: on CUDA it multiplies in bfloat16",
            )
    if config.neftune_noise_alpha and (config.share_prefixes == "always" or config.cache_trunk):
        other = "cache_trunk" if config.cache_trunk else "share_prefixes = always"
        raise UserError(f"neftune_noise_alpha and {other} do not go together", hint="each row has noise of its own: leave one out")
    if config.attention == "flash" and config.share_prefixes == "always":
        raise UserError("attention = flash and share_prefixes = always do not go together", hint="flash takes rows: leave one out")
    if config.fsdp and config.quantization != "none":
        raise UserError(f"fsdp and quantization = {config.quantization} do not go together", hint="leave one out")
    if config.lr_schedule != "wsd" and config.decay_ratio != default("decay_ratio"):
        raise UserError(f"decay_ratio is of lr_schedule = wsd, not of {config.lr_schedule}", hint="leave one out")
    if config.fsdp and launched() != "torch":
        raise UserError("fsdp cuts the weights over several processes", hint="start the command with torchrun, or --set fsdp=false")
    for name, values, package, extra in PACKAGES:
        value = getattr(config, name)
        if value in values and importlib.util.find_spec(package) is None:
            raise UserError(f"{name} = {_said(value)} needs {package}", hint=f"pip install 'mlx-finetune[{extra}]'")
    if config.torch_compile and not any(map(shutil.which, COMPILERS)):
        raise UserError(f"torch_compile = true needs one of {', '.join(COMPILERS)}", hint="install a C++ compiler, or leave it out")


def folds(config: RunConfig) -> bool:
    """Whether the settings let rows that begin alike be folded into trees: noise of its own and flash attention are for rows."""
    return config.share_prefixes != "never" and not config.neftune_noise_alpha and config.attention != "flash"


def for_a_look(config: RunConfig, engine: str) -> RunConfig:
    """The config of a run as `engine` opens it to look at what was trained: without what only training needs."""
    names = ("cache_trunk", "torch_compile", "fsdp", "use_liger_kernel", "device", "attention")
    idle = {name: default(name) for name in names}
    idle |= {name: default(name) for name, _ in _lacking(config, engine)}
    if config.optimizer == "adamw_8bit":
        idle["optimizer"] = "adamw"  # has the same moments, and needs no bitsandbytes
    return config.model_copy(update=idle)


def _lacking(config: RunConfig, engine: str) -> Iterator[tuple[str, str]]:
    """Settings whose value `engine` does not have, and what to do there."""
    for name, values, hint in LACKS[engine]:
        value = getattr(config, name)
        if value in values if values else value != default(name):
            yield name, hint


def _said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
