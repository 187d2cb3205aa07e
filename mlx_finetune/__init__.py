"""mlx-finetune: your gptme conversations in, a tuned Hugging Face model out."""

import os

# OpenMP reads this when torch or the BLAS before MLX is loaded, so it is set before anything else is imported. Threads that spin
# while they wait made a step of either engine up to 100 times slower on cores that another program shares.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> str:
    """`__version__`, looked up when it is asked for: what finds it takes longer to load than a help text has."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("mlx-finetune")
