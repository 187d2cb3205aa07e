"""What the readings of a Mac mean. Pure functions of texts: they are tested with readings that others published, not on a Mac.

Sources: `iogpu.wired_limit_mb` as MLX's `set_wired_limit` names it (in MiB, 0: macOS decides; it is forgotten at the next start,
and Metal's recommendedMaxWorkingSetSize follows it); the watchdog: github.com/ml-explore/mlx/issues/3267, open.
"""

import re
from collections.abc import Iterator, Mapping

from mlx_finetune.planning.doctor.findings import Finding
from mlx_finetune.planning.machine import GIB, metal_limit

MIB = 1024**2
OLDEST = 14  # of macOS: MLX's wheels are made for it and for later ones
LEFT = 4 * GIB  # for macOS and other programs, or an eighth of the memory where that is more
NAMES = (
    "machdep.cpu.brand_string",
    "hw.memsize",
    "hw.optional.arm64",
    "sysctl.proc_translated",
    "iogpu.wired_limit_mb",
    "kern.osproductversion",
)


def sysctl_values(text: str) -> dict[str, str]:
    """Name and value of each line of `sysctl NAME…`; names that the Mac does not know are missing."""
    pairs = (re.split(r"\s*[:=]\s*", line, maxsplit=1) for line in text.splitlines())
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


def mac_findings(values: Mapping[str, str], environment: Mapping[str, str]) -> Iterator[Finding]:
    """All that is of a Mac alone."""
    yield chip(values)
    yield version(values)
    yield wired_limit(values)
    yield watchdog(environment)


def chip(values: Mapping[str, str]) -> Finding:
    """Apple silicon, and a Python that is made for it."""
    name = values.get("machdep.cpu.brand_string", "chip not known")
    if values.get("sysctl.proc_translated") == "1":
        return Finding("chip", "fails", f"{name}, but this Python is made for Intel", "install a Python for arm64: MLX needs it")
    if values.get("hw.optional.arm64") != "1":
        return Finding("chip", "fails", f"{name}: no Apple silicon", "MLX computes on M1 and later; take a Linux machine with CUDA")
    return Finding("chip", "ok", name)


def version(values: Mapping[str, str]) -> Finding:
    """Of macOS."""
    told = values.get("kern.osproductversion", "")
    major = int(told.partition(".")[0]) if told.partition(".")[0].isdigit() else 0
    if major < OLDEST:
        return Finding("macOS", "fails", told or "version not known", f"update to macOS {OLDEST} or later: MLX is made for those")
    return Finding("macOS", "ok", told)


def wired_limit(values: Mapping[str, str]) -> Finding:
    """How much of the memory the GPU may hold, and how to raise that."""
    if not values.get("hw.memsize", "").isdigit():
        return Finding("memory of the GPU", "note", "not known", "sysctl hw.memsize says how much memory this Mac has")
    memory, told = int(values["hw.memsize"]), values.get("iogpu.wired_limit_mb", "0")
    limit = int(told) * MIB if told.isdigit() else 0
    usual, most = metal_limit(memory)[0], memory - max(LEFT, memory // 8)
    if limit > memory - LEFT // 2:
        found = f"iogpu.wired_limit_mb={told} leaves macOS {max(0, memory - limit) / GIB:.1f} GB"
        return Finding("memory of the GPU", "note", found, f"the Mac may freeze: sudo sysctl iogpu.wired_limit_mb={most // MIB}")
    if limit:
        return Finding("memory of the GPU", "ok", f"up to {limit / GIB:.1f} GB (iogpu.wired_limit_mb={told}, until the next start)")
    found = f"about {usual / GIB:.1f} GB or more, as macOS decides (iogpu.wired_limit_mb=0)"
    if most <= usual:
        return Finding("memory of the GPU", "ok", found)
    raised = f"sudo sysctl iogpu.wired_limit_mb={most // MIB} gives {most / GIB:.0f} GB until the next start"
    return Finding("memory of the GPU", "ok", found, f"only where a plan needs more: {raised}")


def watchdog(environment: Mapping[str, str]) -> Finding:
    """macOS ends GPU work that holds up the display; others saw it end LoRA training after minutes."""
    relaxed = environment.get("AGX_RELAX_CDM_CTXSTORE_TIMEOUT") == "1"
    found = "macOS may end long GPU work while a display is on (error: Impacting Interactivity)"
    if relaxed:
        return Finding("GPU watchdog", "ok", f"{found}; relaxed here by AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1")
    return Finding(
        "GPU watchdog",
        "ok",
        found,
        "for a long run: caffeinate -s mlx-finetune …, plugged in, and let the display sleep; where that is no way,"
        " AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 helped others (mlx issue 3267). A run goes on with --resume",
    )
