"""One side of torch_speed.py in a process of its own: a warm-up step and some timed ones, told in JSON and answered in JSON.

`ours` is our torch engine as `train` uses it; the others are in torch_speed_peers.py. All read the same prepared folder, start
from the same adapter, B not zero so that the loss sees it, and step at the same constant rate.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch_speed_meter import RATE, Job, Meter
from torch_speed_peers import hf, trl, unsloth
from train_speed_steps import ALPHA, RANK, Figures, adapter_of

from mlx_finetune.config import RunConfig, make_config
from mlx_finetune.data.batches import Batch
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.engines import open_engine
from mlx_finetune.training.run import packed


def ours(job: Job, meter: Meter) -> Figures:
    """Steps as the loop of `train` takes them."""
    import mlx_finetune.engines.torch.engine  # noqa: F401

    dataset = Dataset.open(Path(job["data"]))
    config = packed(ours_config(job), dataset)
    meter.loading()
    engine = open_engine(config, Path(job["model"]))
    meter.loaded()
    adapter = {f"adapter/{name}": array for name, array in adapter_of(engine.targets).items()}
    engine.load_state(engine.state() | adapter, updates=0)
    warm, size = list(dataset.valid), config.batch_size
    results = [engine.step([Batch.of(warm[i : i + size]) for i in range(0, len(warm), size)], RATE, seed=0)]
    meter.mark()
    for step in range(dataset.steps_per_epoch(config) * job["repeat"]):
        results.append(engine.step(dataset.batches_at(step, config), RATE, seed=step))
        meter.mark()
    told = {name: value for name, value in config.to_dict().items() if value != RunConfig.model_fields[name].get_default()}
    return {
        "losses": [result.loss for result in results],
        "learned": sum(result.tokens for result in results[1:]),
        "computed": sum(result.computed for result in results[1:]),
        "adapted": sum(array.size for array in adapter.values()),
        "settings": told | {"learning_rate": RATE, "other fields of RunConfig": "their defaults"},
    }


def ours_config(job: Job) -> RunConfig:
    """The same adapter and optimizer as the peers'; `options` win."""
    values: dict[str, Any] = {"engine": "torch", "dtype": job["dtype"], "rank": RANK, "alpha": ALPHA, "weight_decay": 0.0}
    values |= {"batch_size": job["batch"], "gradient_accumulation": job["accumulation"], "grad_checkpoint": int(job["checkpoint"])}
    return make_config(values | job["options"], "--ours")


SIDES: dict[str, Callable[[Job, Meter], Figures]] = {"ours": ours, "trl": trl, "hf": hf, "unsloth": unsloth}


def measure(job: Job) -> Figures:
    """What one side does; only that it failed where the memory of the device was not enough."""
    import torch

    meter = Meter(job)
    try:
        figures = SIDES[job["side"]](job, meter)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    return figures | meter.figures()


def main() -> None:
    """Answers the job in the first argument; all else that is printed goes to stderr."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.loads(sys.argv[1])
    if "make" in job:
        from torch_speed_data import make_random

        print(json.dumps(str(make_random(job["make"], Path(job["folder"])))), file=answer)
    else:
        print(json.dumps(measure(job), default=str), file=answer)


if __name__ == "__main__":
    main()
