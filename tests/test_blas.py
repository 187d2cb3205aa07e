"""The BLAS in front of MLX's: loaded before it, faster, and right. Each case is a process: loading is for good."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SIZE = 768

# Prints what was preloaded, the best time of a product in seconds and its largest error against float64.
PROGRAM = f"""
import time
{{imports}}
import numpy as np
generator = np.random.default_rng(0)
a, b = generator.standard_normal((2, {SIZE}, {SIZE}), dtype=np.float32)
left, right = mx.array(a), mx.array(b)
mx.eval(left, right)
seconds = []
for _ in range(4):
    start = time.perf_counter()
    product = mx.matmul(left, right, stream=mx.cpu)
    mx.eval(product)
    seconds.append(time.perf_counter() - start)
print(fast_blas, min(seconds), np.abs(np.array(product) - a.astype(np.float64) @ b).max(), sep="|")
"""
PRELOADED = "from mlx_finetune.engines.mlx import FAST_BLAS as fast_blas"
PLAIN = "fast_blas = None"

linux_with_torch = pytest.mark.skipif(
    sys.platform != "linux" or find_spec("torch") is None,
    reason="the fast BLAS that this test counts on is torch's, on Linux",
)


def run(imports: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program in a fresh process without the variables of this one that steer it."""
    inherited = {name: value for name, value in os.environ.items() if name != "MLX_FINETUNE_BLAS"}
    program = PROGRAM.format(imports=imports)
    return subprocess.run([sys.executable, "-c", program], env=inherited | environment, capture_output=True, text=True)


def measure(imports: str, **environment: str) -> tuple[str, float, float]:
    finished = run(imports, **environment)
    assert finished.returncode == 0, finished.stderr
    name, seconds, error = finished.stdout.strip().split("|")
    return name, float(seconds), float(error)


@linux_with_torch
def test_matrices_multiply_at_least_four_times_faster_and_as_exactly() -> None:
    name, fast, error = measure(f"{PRELOADED}\nimport mlx.core as mx")
    _, slow, plain_error = measure(f"{PLAIN}\nimport mlx.core as mx")
    assert name != "None"
    assert fast * 4 < slow  # 20 to 40 times when the machine is quiet
    assert error < 1e-3 and plain_error < 1e-3


@linux_with_torch
@pytest.mark.parametrize(
    "imports",
    [
        f"{PRELOADED}\nimport torch\nimport mlx.core as mx",
        f"{PRELOADED}\nimport mlx.core as mx\nimport torch",
        f"import torch\n{PRELOADED}\nimport mlx.core as mx",
    ],
    ids=["torch before mlx", "torch after mlx", "torch before all"],
)
def test_mlx_and_torch_share_a_process_in_every_order(imports: str) -> None:
    use_torch = "x = torch.ones(64, 64, requires_grad=True); (x @ x).sum().backward(); assert (x.grad == 128).all()"
    name, _, error = measure(f"{imports}\n{use_torch}")
    assert name != "None"
    assert error < 1e-3


@linux_with_torch
def test_a_library_of_ones_own_is_taken_first() -> None:
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    path = str(Path(spec.origin).parent / "lib" / "libtorch_cpu.so")
    assert measure(f"{PRELOADED}\nimport mlx.core as mx", MLX_FINETUNE_BLAS=path)[0] == path


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is preloaded on other systems")
@pytest.mark.parametrize(("path", "named"), [("/nowhere/libblas.so", "cannot open"), ("libm.so.6", "has no sgemm_")])
def test_a_library_that_is_no_blas_is_refused_by_name(path: str, named: str) -> None:
    finished = run(PRELOADED, MLX_FINETUNE_BLAS=path)
    assert finished.returncode != 0
    assert "UserError: $MLX_FINETUNE_BLAS" in finished.stderr and named in finished.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is preloaded on other systems")
def test_after_mlx_is_loaded_nothing_is_preloaded() -> None:
    name, _, error = measure(f"import mlx.core as mx\n{PRELOADED}")
    assert name == "None"
    assert error < 1e-3
