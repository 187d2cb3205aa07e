"""One engine multiplies a matrix, in a process of its own that may crash or hang: `python -m …probe mlx`; one JSON object."""

import json
import sys
import time
from typing import Any

import numpy as np

SIZE = 512  # of the square matrices whose product is checked
TIMED = 1024  # and of those that are timed
ROUNDS = 8
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}  # of the largest number in the product; TF32 and Metal round float32 a little more


def matrices(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two float32 matrices [size, size], and their product in float64."""
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((size, size)).astype(np.float32) for _ in range(2))
    return a, b, a.astype(np.float64) @ b.astype(np.float64)


def error_of(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference as a share of the largest number."""
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


def probe_mlx() -> dict[str, Any]:
    """Where MLX computes, how far from right, and how fast."""
    from mlx_finetune.engines.mlx import FAST_BLAS  # before MLX itself

    import mlx.core as mx  # isort: skip

    metal = mx.metal.is_available()
    a, b, expected = matrices(SIZE)
    error = error_of(np.array(mx.array(a) @ mx.array(b)), expected)
    left = mx.array(np.ones((TIMED, TIMED), np.float32))
    mx.eval(left @ left)
    start = time.perf_counter()
    for _ in range(ROUNDS):
        mx.eval(left @ left)
    rate = ROUNDS * 2 * TIMED**3 / (time.perf_counter() - start)
    device = mx.device_info() if metal else {}
    return {
        "device": str(device.get("device_name", "Metal")) if metal else "GPU" if mx.default_device() == mx.gpu else "CPU",
        "metal": metal,
        "errors": {"float32": error},
        "gflops": rate / 1e9,
        "blas": FAST_BLAS,
        "usable": int(device.get("max_recommended_working_set_size", 0)),
    }


def probe_torch() -> dict[str, Any]:
    """Whether CUDA can be used, why not, and whether it multiplies rightly in the dtypes that training takes."""
    import torch

    from mlx_finetune.engines.torch.device import half_of, without_cuda

    a, b, expected = matrices(SIZE)
    reason = without_cuda()
    where = "cpu" if reason else "cuda"
    half = half_of(where)
    errors = {}
    for dtype in dict.fromkeys(("float32", half)):
        left, right = (torch.from_numpy(each).to(where, getattr(torch, dtype)) for each in (a, b))
        errors[dtype] = error_of((left @ right).float().cpu().numpy(), expected)
    found: dict[str, Any] = {"device": "CPU", "cuda": not reason, "reason": reason, "errors": errors, "bf16": half == "bfloat16"}
    if not reason:
        free, total = torch.cuda.mem_get_info()
        found |= {"device": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
        found |= {"free": free, "total": total, "devices": torch.cuda.device_count()}
    return found


if __name__ == "__main__":
    print(json.dumps({"mlx": probe_mlx, "torch": probe_torch}[sys.argv[1]]()))
