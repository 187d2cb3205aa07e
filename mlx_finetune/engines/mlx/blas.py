"""A faster BLAS in front of the one that MLX's Linux wheel brings.

On Linux without a GPU, MLX multiplies float32 matrices with `cblas_sgemm` of the reference BLAS in its wheel: 2 to 7
GFLOP/s. That function does no arithmetic itself: it calls Fortran's `sgemm_`, and the dynamic linker looks for that
name first among the libraries loaded with RTLD_GLOBAL. A faster library loaded that way *before* MLX (whose names are bound
once, as it is loaded) therefore computes in its place, 20 to 40 times faster, and MLX is left as it is.

PyTorch's CPU library exports the `sgemm_` of the MKL inside it, so a machine with the torch extra needs nothing else;
that one library is loaded (0.2 s), torch is not imported. On macOS MLX has Metal and Accelerate: nothing to do.
"""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from mlx_finetune.errors import UserError

VARIABLE = "MLX_FINETUNE_BLAS"


def preload_fast_blas() -> str | None:
    """Loads the first of $MLX_FINETUNE_BLAS, the system's OpenBLAS and torch's MKL; returns which.

    None: MLX keeps its own. So it does where it is loaded already; that is slower, not wrong.

    Raises:
        UserError: $MLX_FINETUNE_BLAS names a file that cannot be loaded or is no BLAS.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return None
    if chosen := os.environ.get(VARIABLE):
        return _load_chosen(chosen)
    for candidate in _candidates():
        try:
            library = ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError:  # not on this machine: the next one
            continue
        if hasattr(library, "sgemm_"):
            return candidate
    return None


def _load_chosen(path: str) -> str:
    try:
        library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise UserError(f"${VARIABLE}: {error}", hint=f"unset {VARIABLE}, or give the path of a BLAS library") from error
    if not hasattr(library, "sgemm_"):
        raise UserError(f"${VARIABLE}: {path} has no sgemm_", hint="give the path of a BLAS library such as libopenblas.so.0")
    return path


def _candidates() -> Iterator[str]:
    yield "libopenblas.so.0"
    torch = importlib.util.find_spec("torch")
    for folder in (torch and torch.submodule_search_locations) or ():
        yield str(Path(folder) / "lib" / "libtorch_cpu.so")
