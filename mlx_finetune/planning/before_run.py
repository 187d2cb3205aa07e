"""Whether a run fits into this machine, asked before its model is loaded."""

import math
from pathlib import Path

import numpy as np

from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import WIDTHS
from mlx_finetune.data.dataset import ExampleStore
from mlx_finetune.errors import UserError
from mlx_finetune.planning.advice import gb, needed, refuse_what_cannot_fit
from mlx_finetune.planning.machine import this_machine
from mlx_finetune.planning.memory import dials_of, memory
from mlx_finetune.planning.model_shape import model_shape

FOLDED = (8, 4, 2)  # times the largest micro-batch, folded together at most
SHARE_FOR_FOLDING = 0.6  # of the memory that may be used: what is folded is computed once, and more is left for other programs


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
    dials = dials_of(with_pack_length(model, config, train, learned), shape, learned, machine.on_gpu)
    if config.pack_length and needed(memory(shape, dials)) > machine.usable:
        folded = gb(needed(memory(shape, dials)))
        message = f"pack_length = {config.pack_length} needs {folded}, {gb(machine.usable)} may be used ({machine.rule})"
        raise UserError(message, hint="leave pack_length out: it is then chosen by the memory")
    refuse_what_cannot_fit(shape, dials, machine)
    return f"up to {gb(needed(memory(shape, dials)))} of memory; {gb(machine.usable)} may be used"


def with_pack_length(model: Path, config: RunConfig, train: ExampleStore, learned: float) -> RunConfig:
    """`max_length` as long as the longest example, and `pack_length` said where the config leaves it open.

    Up to eight micro-batches are folded together where that takes no more than a part of the memory, else as much as the
    largest micro-batch has.
    """
    longest = max(64, math.ceil((int(np.max(train.lengths)) - 1) / WIDTHS) * WIDTHS)
    config = config.model_copy(update={"max_length": longest})
    if config.pack_length or config.engine != "mlx" or config.share_prefixes == "never":
        return config
    machine = this_machine()
    one = longest * config.batch_size
    for times in (times for times in FOLDED if times <= config.gradient_accumulation):
        folded = config.model_copy(update={"pack_length": times * one})
        try:
            shape = model_shape(str(model))
        except UserError:
            break
        if needed(memory(shape, dials_of(folded, shape, learned, machine.on_gpu))) <= SHARE_FOR_FOLDING * machine.usable:
            return folded
    return config.model_copy(update={"pack_length": one})
