"""What a launcher (torchrun, mlx.launch) says in the environment of the processes that it starts with the same command line."""

import os
from collections.abc import Mapping

RANKS = ("RANK", "MLX_RANK")


def rank_of(environment: Mapping[str, str] = os.environ) -> int:
    """The number that a launcher gave this process, known before anything is loaded; 0 without one."""
    return next((int(environment[name]) for name in RANKS if name in environment), 0)


def launched(environment: Mapping[str, str] = os.environ) -> str | None:
    """Which engine a launcher wants processes of: torch (torchrun), mlx (mlx.launch); None without one."""
    size = environment.get("WORLD_SIZE", "")
    if size.isdecimal() and int(size) > 1:
        return "torch"
    return "mlx" if "MLX_RANK" in environment else None
