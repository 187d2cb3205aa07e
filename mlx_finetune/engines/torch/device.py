"""Where torch computes, and why not where it was asked to."""

import warnings

import torch

from mlx_finetune.config import RunConfig
from mlx_finetune.errors import UserError
from mlx_finetune.launched import launched

INSTALL = "https://pytorch.org/get-started/locally says which torch fits this machine"


def choose_device(asked: str) -> str:
    """`cuda`, `mps` or `cpu`; `auto`: CUDA where it can be used, else the CPU.

    Raises:
        UserError: what was asked for is not there, with the reason.
    """
    if asked == "auto":
        return "cpu" if without_cuda() else "cuda"
    if asked == "cuda" and (reason := without_cuda()):
        raise UserError(f"device = cuda: {reason}", hint=f"{INSTALL}; or leave device out")
    if asked == "mps" and not torch.backends.mps.is_available():
        raise UserError("device = mps: there is no Metal here, or this torch is built without it", hint="leave device out")
    return asked


def check_device(config: RunConfig) -> str:
    """The device of a run.

    Raises:
        UserError: it is not there, or lacks what a setting asks for.
    """
    device = choose_device(config.device)
    for name, asked in (("attention", config.attention == "flash"), ("use_liger_kernel", config.use_liger_kernel)):
        if asked and device != "cuda":
            raise UserError(f"{name} = {str(getattr(config, name)).lower()} is for CUDA, not for {device}", hint="leave it out")
    if config.attention == "flash" and config.fine_tune_type != "full" and _dtype_of(config, device) == "float32":
        raise UserError("attention = flash computes in bfloat16 or float16, and dtype is float32", hint="leave attention out")
    if device == "mps" and launched() == "torch":
        raise UserError("device = mps: several processes are for MLX there", hint="mlx.launch, or start the command by itself")
    if device == "mps" and config.dropout and config.grad_checkpoint:
        raise UserError(
            "device = mps: dropout and grad_checkpoint do not go together there", hint="--set dropout=0, or --engine mlx"
        )
    return device


def _dtype_of(config: RunConfig, device: str) -> str:
    return half_of(device) if config.dtype == "auto" else config.dtype


def without_cuda() -> str | None:
    """Why CUDA cannot be used, in words; None where it can."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        return _reason([str(each.message) for each in said])
    major, minor = torch.cuda.get_device_capability()
    if torch.version.cuda and not _built_for(major, minor, torch.cuda.get_arch_list()):
        return f"torch {torch.__version__} is not built for this GPU ({torch.cuda.get_device_name()}, compute {major}.{minor})"
    return None


def _reason(said: list[str]) -> str:
    if said:  # such as: the NVIDIA driver on your system is too old (found version ...)
        return " ".join(said[0].split())[:200]
    return f"torch {torch.__version__} finds no NVIDIA GPU"


def _built_for(major: int, minor: int, built: list[str]) -> bool:
    """Code for sm_XY runs on that and on later minors of one major; compute_XY is compiled for anything later."""
    for name in built:
        kind, _, number = name.partition("_")
        digits = "".join(filter(str.isdigit, number))
        if not digits:
            continue
        found = int(digits[:-1]), int(digits[-1])
        if found <= (major, minor) and (kind == "compute" or found[0] == major):
            return True
    return False


def half_of(device: str) -> str:
    """The dtype of frozen weights where none is asked for: bfloat16 on a GPU that multiplies in it, else float32."""
    if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32"
