"""Which engine `auto` takes, and whether it computes: each in a process of its own, for a driver may crash it or hang."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_finetune.errors import UserError
from mlx_finetune.planning.doctor.findings import Finding, State
from mlx_finetune.planning.doctor.probe import TOLERANCE
from mlx_finetune.planning.machine import GIB, Machine, this_machine

SECONDS = 120.0  # the first import of torch from a cold disk takes half a minute
SLOW = 15.0  # GFLOP/s; the reference BLAS in MLX's Linux wheel reaches 2 to 7
DRIVER = "https://pytorch.org/get-started/locally says which torch fits this machine"
NVIDIA = Path("/dev/nvidia0")
CUDA_SHARE = 0.9  # of a GPU's memory
Probed = dict[str, Any]


def probe(engine: str, command: Sequence[str] = (), seconds: float = SECONDS) -> Probed:
    """What the engine's probe found, or `failed`: why there is nothing. `command`: another program than ours, for tests."""
    program = command or (sys.executable, "-m", "mlx_finetune.planning.doctor.probe", engine)
    try:
        done = subprocess.run(program, capture_output=True, text=True, timeout=seconds, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer within {seconds:g} seconds"}
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        how = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        return {"failed": f"{how}: {last.strip()[:200]}" if last else how}
    found: Probed = json.loads(done.stdout.splitlines()[-1])
    return found


def chosen(name: str, probed: dict[str, Probed]) -> Finding:
    """What `--engine auto` takes here, and why."""
    if os.uname().sysname == "Darwin" and os.uname().machine == "arm64":
        why = "this is Apple silicon"
    elif name == "torch":
        why = "CUDA is found" if probed["torch"].get("cuda") else "it is installed, and no Metal is here"
    else:
        why = "torch is not installed"
    return Finding("engine", "ok", f"auto takes {name}: {why}")


def engine_findings(name: str, probed: dict[str, Probed], has_nvidia: bool) -> Iterator[Finding]:
    """`name`: the engine that `auto` takes; one that only could be taken does no harm."""
    yield chosen(name, probed)
    for engine, found in probed.items():
        state: State = "fails" if engine == name else "note"
        again = f"pip install --force-reinstall {engine}"
        wrong = [dtype for dtype, error in found.get("errors", {}).items() if not error <= TOLERANCE[dtype]]
        if "failed" in found:
            yield Finding(engine, state, f"does not compute: {found['failed']}", again)
        elif wrong:
            share = ", ".join(f"{100 * found['errors'][dtype]:.2g} % in {dtype}" for dtype in wrong)
            yield Finding(engine, state, f"multiplies wrongly on {found['device']}: off by {share}", again)
        else:
            yield _mlx(found) if engine == "mlx" else _torch(found, has_nvidia)


def _mlx(found: Probed) -> Finding:
    if found["metal"]:
        usable = f", up to {found['usable'] / GIB:.1f} GB" if found["usable"] else ""
        return Finding(
            "mlx", "ok", f"computes on {found['device']} with Metal{usable}; {found['gflops'] / 1e3:.1f} TFLOP/s in float32"
        )
    if os.uname().sysname == "Darwin":
        return Finding("mlx", "fails", "finds no Metal", "log in at the Mac itself, not inside a virtual machine or container")
    if found["device"] != "CPU":
        return Finding("mlx", "ok", f"computes on a GPU without Metal: {found['gflops'] / 1e3:.1f} TFLOP/s in float32")
    blas = "its own BLAS" if found["blas"] is None else f"the BLAS {Path(found['blas']).name}"
    told = f"computes on the CPU, with {blas}: {found['gflops']:.0f} GFLOP/s"
    if found["gflops"] < SLOW:
        return Finding("mlx", "note", f"{told}, which is slow", "apt install libopenblas0, or pip install 'mlx-finetune[torch]'")
    return Finding("mlx", "ok", told)


def _torch(found: Probed, has_nvidia: bool) -> Finding:
    if found["cuda"]:
        capability = ".".join(map(str, found["capability"]))
        half = "bfloat16" if found["bf16"] else "no bfloat16: float32 is taken, twice as large"
        several = f" ({found['devices']} of them: torchrun takes all)" if found["devices"] > 1 else ""
        told = f"computes on {found['device']}{several}, compute {capability}, {half}"
        return Finding("torch", "ok", f"{told}; {found['free'] / GIB:.1f} of {found['total'] / GIB:.1f} GB free")
    if has_nvidia:
        return Finding("torch", "note", f"computes on the CPU, although there is an NVIDIA GPU: {found['reason']}", DRIVER)
    return Finding("torch", "ok", f"computes on the CPU: {found['reason']}")


def engine_that_auto_takes() -> str:
    """As a run would choose.

    Raises:
        UserError: none is installed.
    """
    from mlx_finetune.engines import choose_engine

    return choose_engine("auto")


def all_findings() -> Iterator[Finding]:
    """Chooses, probes what is installed, and says of each."""
    import importlib.util

    try:
        name = engine_that_auto_takes()
    except UserError as error:
        yield Finding("engine", "fails", error.message, error.hint)
        return
    installed = [engine for engine in ("mlx", "torch") if importlib.util.find_spec(engine)]
    yield from engine_findings(name, {engine: probe(engine) for engine in installed}, Path("/dev/nvidia0").exists())


def machine_here() -> tuple[Machine, str]:
    """What a run is planned for, and the engine that `auto` takes: on CUDA the memory is the GPU's."""
    engine = engine_that_auto_takes()
    if engine == "torch" and NVIDIA.exists():
        found = probe("torch")
        if found.get("cuda"):
            rule = f"{100 * CUDA_SHARE:.0f} % of the GPU's memory, counted as for MLX"
            return Machine(found["device"], found["total"], int(CUDA_SHARE * found["total"]), rule, None), engine
    return this_machine(), engine
