"""Whether a run fits into this machine, asked before its model is loaded."""

from pathlib import Path

import numpy as np

from mlx_finetune.config import RunConfig
from mlx_finetune.data.dataset import ExampleStore
from mlx_finetune.errors import UserError
from mlx_finetune.planning.advice import gb, needed, refuse_what_cannot_fit
from mlx_finetune.planning.machine import Machine, this_machine
from mlx_finetune.planning.memory import FLOAT32, dials_of, memory
from mlx_finetune.planning.model_shape import ModelShape, model_shape

SLOTS = {"adamw": 2, "adamw_8bit": 2, "muon": 1, "adafactor": 0}  # numbers that the optimizer keeps of each that is trained


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
    rows = config.model_copy(update={"max_length": longest, "pack_length": None})
    if config.fine_tune_type == "full":
        return _all_weights(shape, rows, learned, machine)
    refuse_what_cannot_fit(shape, dials_of(rows, shape, learned, machine.on_gpu), machine)
    most = longest * config.batch_size * config.gradient_accumulation  # in a step, however much may be folded together
    folded = 0 if config.share_prefixes == "never" else min(config.pack_length or 0, most)
    dials = dials_of(rows.model_copy(update={"pack_length": folded or None}), shape, learned, machine.on_gpu)
    taken = needed(memory(shape, dials))
    if taken > machine.usable:
        message = f"pack_length = {config.pack_length} needs {gb(taken)}, {gb(machine.usable)} may be used ({machine.rule})"
        raise UserError(message, hint="set pack_length=null: then no more is folded together than the longest example has")
    return f"up to {gb(taken)} of memory; {gb(machine.usable)} may be used"


def _all_weights(shape: ModelShape, config: RunConfig, learned: float, machine: Machine) -> str:
    """Where weights are trained: they, their gradient twice (the sum, and that of a micro-batch), and what the optimizer keeps."""
    adapted = config.model_copy(update={"dtype": "float32", "rank": 1, "target_modules": "all-linear"})
    step = needed(memory(shape, dials_of(adapted, shape, learned, machine.on_gpu)))
    layers = (config.num_layers or shape.sizes.layers) / shape.sizes.layers
    taken = int(step + layers * shape.parameters * FLOAT32 * (2 + SLOTS[config.optimizer]))
    if taken > machine.usable:
        message = f"fine_tune_type = full needs {gb(taken)}, {gb(machine.usable)} may be used ({machine.rule})"
        raise UserError(message, hint="train an adapter (fine_tune_type = lora), or set num_layers, or optimizer = adafactor")
    return f"up to {gb(taken)} of memory; {gb(machine.usable)} may be used"
