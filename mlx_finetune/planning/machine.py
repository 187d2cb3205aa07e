"""Machines: Apple's chips as a table, this machine, and how much of its memory a training run may take."""

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlx_finetune.errors import UserError
from mlx_finetune.nearest import did_you_mean

GIB = 1024**3  # what a Mac calls a GB of memory
SMALL = 36 * GIB
CPU_SHARE = 0.8  # of the memory, where the CPU computes and other programs want some too
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
Source = Literal["vendor", "others", "at least"]


@dataclass(frozen=True)
class Chip:
    """The largest version of a chip. Apple's GPUs multiply 16- and 32-bit numbers equally fast (philipturner/metal-benchmarks)."""

    name: str
    memories: tuple[int, ...]  # GB it is sold with
    bandwidth: float  # GB/s; always Apple's own figure
    tflops: float  # of the GPU, fp16 and fp32
    source: Source  # of `tflops`. vendor: Apple says it; others: benchmark sites; at least: of the chip before it


# Smaller versions have fewer GPU cores and, of M3 Max, M4 Max and M5 Max, less bandwidth (300, 410, 460 GB/s).
# others: huggingface.js hardware.ts (#1044). Measured in matrix products: M4 Max 13.8 (fp32) and 14.8 (fp16), 75 to 80 % of it.
CHIPS = tuple(
    Chip(*row)
    for row in (
        ("M1", (8, 16), 68, 2.6, "vendor"),
        ("M1 Pro", (16, 32), 200, 5.2, "vendor"),
        ("M1 Max", (32, 64), 400, 10.4, "vendor"),
        ("M1 Ultra", (64, 128), 800, 20.8, "vendor"),
        ("M2", (8, 16, 24), 100, 3.6, "vendor"),
        ("M2 Pro", (16, 32), 200, 6.8, "others"),
        ("M2 Max", (32, 64, 96), 400, 13.6, "others"),
        ("M2 Ultra", (64, 128, 192), 800, 27.2, "others"),
        ("M3", (8, 16, 24), 100, 4.1, "others"),
        ("M3 Pro", (18, 36), 150, 7.4, "others"),
        ("M3 Max", (36, 48, 64, 96, 128), 400, 14.2, "others"),
        ("M3 Ultra", (96, 256, 512), 819, 28.4, "others"),
        ("M4", (16, 24, 32), 120, 4.6, "others"),
        ("M4 Pro", (24, 48, 64), 273, 9.2, "others"),
        ("M4 Max", (36, 48, 64, 128), 546, 18.4, "others"),
        ("M5", (16, 24, 32), 153, 4.6, "at least"),
        ("M5 Pro", (24, 48, 64), 307, 9.2, "at least"),
        ("M5 Max", (36, 48, 64, 128), 614, 18.4, "at least"),
    )
)


@dataclass(frozen=True)
class Machine:
    """What a run is planned for; `usable`: bytes that it may hold; `chip`: None where it is not one of Apple's."""

    name: str
    memory: int  # bytes
    usable: int  # bytes
    rule: str  # where `usable` comes from
    chip: Chip | None
    on_gpu: bool = True


def find_chip(name: str) -> Chip:
    """`M2`, `m2 pro`, `Apple M2 Max`.

    Raises:
        UserError: no such chip in the table.
    """
    words = re.sub(r"(?i)\bapple\b|\bchip\b", " ", name).lower()
    words = re.sub(r"(?<=\d)(?=[a-z])", " ", words)
    wanted = " ".join(words.split())
    for chip in CHIPS:
        if chip.name.lower() == wanted:
            return chip
    names = [chip.name for chip in CHIPS]
    raise UserError(f"--chip {name}: not in the table", hint=did_you_mean(wanted, names, f"known are {', '.join(names)}"))


def parse_memory(text: str) -> int:
    """Bytes: `16GB`, `16`, `16GiB` and `16 gb` are what a Mac calls 16 GB, 2^30 bytes each; `512MB`.

    Raises:
        UserError: not a size of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:(g|m|t)(?:i?b)?)?\s*", text.lower())
    size = float(match[1]) * {"m": GIB / 1024, "g": GIB, "t": GIB * 1024}[match[2] or "g"] if match else 0
    if not GIB <= size <= 4096 * GIB:
        raise UserError(f"--memory {text}: not a size of memory", hint="write --memory 16GB, as the Mac was sold")
    return int(size)


def metal_limit(memory: int) -> tuple[int, str]:
    """Bytes that Metal lets one program hold, and the rule.

    recommendedMaxWorkingSetSize as reported: 10,922 MiB of 16 GiB and 21,845 of 32 (two thirds), 49,152 of 64 (three
    quarters). Newer macOS gives more (11.8 of 16 GiB, 107.5 of 128): on the machine itself Metal is asked.
    """
    if memory <= SMALL:
        return memory * 2 // 3, "two thirds of the memory: what macOS leaves to the GPU up to 36 GB"
    return memory * 3 // 4, "three quarters of the memory: what macOS leaves to the GPU above 36 GB"


def planned_machine(chip: Chip | None, memory: int) -> Machine:
    """A Mac of that chip and memory; without a chip nothing is known of its speed."""
    usable, rule = metal_limit(memory)
    name = f"Mac with {chip.name} and" if chip else "Mac with"
    return Machine(f"{name} {memory / GIB:.3g} GB", memory, usable, rule, chip)


def container_limit() -> int | None:
    """Bytes that a container of Linux may hold; None where there is no limit."""
    for path in CGROUPS:
        if path.is_file() and (text := path.read_text(encoding="ascii").strip()).isdigit():
            return int(text)
    return None


def this_machine() -> Machine:
    """The machine that this runs on; on a Mac Metal itself is asked for the limit."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return _this_mac()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = min(memory, container_limit() or memory)
    rule = f"{100 * CPU_SHARE:.0f} % of the memory: no GPU that MLX uses, the CPU computes"
    return Machine(f"{cpu_name()} with {memory / GIB:.3g} GB", memory, int(CPU_SHARE * memory), rule, None, on_gpu=False)


def _this_mac() -> Machine:
    import mlx.core as mx

    brand, memory = _sysctl("machdep.cpu.brand_string"), int(_sysctl("hw.memsize"))
    wanted = brand.removeprefix("Apple ").strip().lower()
    chip = next((chip for chip in CHIPS if chip.name.lower() == wanted), None)  # newer than the table: no speed
    usable = int(mx.device_info()["max_recommended_working_set_size"])
    return Machine(f"this {brand} with {memory / GIB:.3g} GB", memory, usable, "what Metal says of this machine", chip)


def _sysctl(name: str) -> str:
    return subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=True).stdout.strip()


def cpu_name() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
