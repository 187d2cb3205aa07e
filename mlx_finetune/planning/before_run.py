"""Whether a run fits into this machine, asked before its model is loaded."""

from pathlib import Path

import numpy as np

from mlx_finetune.config import RunConfig
from mlx_finetune.data.dataset import ExampleStore
from mlx_finetune.errors import UserError
from mlx_finetune.planning.advice import gb, needed, refuse_what_cannot_fit
from mlx_finetune.planning.machine import this_machine
from mlx_finetune.planning.memory import dials_of, memory
from mlx_finetune.planning.model_shape import model_shape


def check_memory(model: Path, config: RunConfig, train: ExampleStore, learned: float) -> str:
    """How much the run will take, in a sentence. `learned`: the share of its tokens that is learned.

    Raises:
        UserError: more than this machine can give; the hint names the setting to change.
    """
    machine = this_machine()
    try:
        shape = model_shape(str(model))
    except UserError as error:  # trained all the same: what a plan knows less of than the engine
        return f"how much memory this takes is not known beforehand: {error}"
    longest = max(64, int(np.max(train.lengths)))
    dials = dials_of(config.model_copy(update={"max_length": longest}), shape, learned, machine.on_gpu)
    refuse_what_cannot_fit(shape, dials, machine)
    return f"up to {gb(needed(memory(shape, dials)))} of memory; {gb(machine.usable)} may be used"
