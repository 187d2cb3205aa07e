"""mlx_finetune's command line with one thing changed:

`processes_program.py sums FILE train ...`: the first process writes down the bytes of each sum over processes;
`processes_program.py slow SECONDS train ...`: a checkpoint takes so much longer, as one of a real model may.
"""

import atexit
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from mlx_finetune.cli import main
from mlx_finetune.launched import launched, rank_of


def count(file: str) -> None:
    """From now on, and written at the end."""
    if launched() == "torch":
        import torch.distributed

        sizes = counted(torch.distributed, "all_reduce")
    else:
        import mlx_finetune.engines.mlx  # noqa: F401  before MLX is imported: its fast BLAS

        import mlx.core as mx  # isort: skip

        sizes = counted(mx.distributed, "all_sum")
    if not rank_of():
        atexit.register(lambda: Path(file).write_text(json.dumps(sizes), encoding="utf-8"))


def counted(place: Any, name: str) -> list[int]:
    """The bytes of what `place.name` is called with from now on, call by call."""
    own, sizes = getattr(place, name), list[int]()

    def counting(array: Any, *others: Any, **named: Any) -> Any:
        sizes.append(int(array.nbytes))
        return own(array, *others, **named)

    setattr(place, name, counting)
    return sizes


def slow(seconds: str) -> None:
    """Each checkpoint, from now on."""
    from mlx_finetune.training import checkpoint, loop

    own = checkpoint.save_checkpoint

    def save(*arguments: Any) -> Path:
        time.sleep(float(seconds))
        return own(*arguments)

    vars(loop)["save_checkpoint"] = save


if __name__ == "__main__":
    {"sums": count, "slow": slow}[sys.argv[1]](sys.argv[2])
    main(sys.argv[3:])
