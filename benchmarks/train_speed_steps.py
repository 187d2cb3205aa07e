"""One side of train_speed.py in a process of its own: it loads a model once, and measures the steps that it is told on stdin.

`Ours` is our engine as it is; `Peer` is the `train` function of mlx_lm.lora itself, with its compiled step and its optimizer. What
is corrected (masks by weights, sorted and padded to 32, no batch without a learned token) comes in through that function's own
arguments `loss` and `iterate_batches`. Both start from the same adapter and learn at a rate of 0, so each loss is the first one.
"""

import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.config import RunConfig, make_config
from mlx_finetune.data.batches import Batch, Example
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.engines.adapter import Target, initial_adapter

SHORT = 128  # tokens of a block in which attention costs next to nothing
RANK, ALPHA = 8, 16.0
Figures = dict[str, Any]


class Clock:
    """CPU and wall seconds, and the most memory beside `weights`, from `start` on."""

    def __init__(self, weights: int) -> None:
        self.weights = weights

    def start(self) -> None:
        """Forgets what was before."""
        import mlx.core as mx

        mx.clear_cache()
        mx.reset_peak_memory()
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def read(self) -> Figures:
        """Since `start`."""
        import mlx.core as mx

        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        return {"cpu": cpu, "wall": wall, "peak": mx.get_peak_memory() - self.weights}


def adapter_of(targets: Mapping[str, Target]) -> dict[str, np.ndarray]:
    """The same numbers for both sides, B not zero, so that the loss sees the adapter and A has a gradient."""
    arrays, random = initial_adapter(targets, make_config({"rank": RANK, "seed": 0}, "benchmark")), np.random.default_rng(0)
    scaled = {name: 0.02 * random.standard_normal(a.shape).astype(np.float32) for name, a in arrays.items() if "lora_B" in name}
    return arrays | scaled


class Ours:
    """MlxEngine with `options` for its RunConfig."""

    def __init__(self, model: Path, layers: int, checkpoint: bool, options: dict[str, Any]) -> None:
        from mlx.utils import tree_flatten

        from mlx_finetune.engines.mlx.engine import MlxEngine

        self.config = ours_config(layers, checkpoint, options)
        self.engine = MlxEngine(model, self.config)
        arrays = {f"adapter/{name}": array for name, array in adapter_of(self.engine.targets).items()}
        self.engine.load_state(self.engine.state() | arrays, updates=0)
        self.clock = Clock(sum(p.nbytes for n, p in tree_flatten(self.engine.model.parameters()) if "lora_" not in n))

    def step(self, groups: Sequence[Sequence[Example]], warm: bool, pack: int | None = None) -> Figures:
        """One optimizer step on micro-batches, of which at most `pack` tokens are folded together."""
        if pack:
            self.engine.config = self.config.model_copy(update={"pack_length": pack})
        return self._timed([Batch.of(group) for group in groups], warm)

    def profile(self, row: Example) -> Figures:
        """CPU seconds of a step, and of a step without some of its parts."""
        batch, last = Batch.of([row]), len(row.tokens) - 2
        single, short = np.zeros_like(batch.weights), np.zeros((batch.weights.size // SHORT, SHORT), np.float32)
        single[0, last], short[:, -1] = 1, 1
        blocks = Batch(batch.inputs.reshape(short.shape), batch.targets.reshape(short.shape), short)
        tiny = Batch(batch.inputs[:, :32], batch.targets[:, :32], single[:, -32:])
        variants = {
            "step": batch,
            "without_head": Batch(batch.inputs, batch.targets, single),
            "without_head_in_blocks": blocks,
            "fixed": tiny,
        }
        seconds = {name: self._timed([variant], warm=True)["cpu"] for name, variant in variants.items()}
        self.clock.start()
        self.engine.loss_sum(batch)
        return seconds | {"forward": self.clock.read()["cpu"]}

    def _timed(self, batches: list[Batch], warm: bool) -> Figures:
        if warm:
            self.engine.step(batches, 0.0, seed=0)
        self.clock.start()
        result = self.engine.step(batches, 0.0, seed=0)
        return self.clock.read() | {"loss": result.loss, "learned": result.tokens, "computed": result.computed}


class Peer:
    """mlx_lm.lora; its model is loaded as ours is, for it reads the RoPE settings of transformers 5 wrongly."""

    def __init__(self, model: Path, layers: int, checkpoint: bool, options: dict[str, Any]) -> None:
        import mlx.core as mx
        from mlx.utils import tree_flatten, tree_unflatten
        from mlx_lm.tuner.lora import LoRALinear
        from mlx_lm.tuner.trainer import grad_checkpoint
        from mlx_lm.tuner.utils import linear_to_lora_layers

        from mlx_finetune.engines.mlx.load import load_model

        self.folder, self.model = model, load_model(model, "float32")
        self.clock = Clock(sum(p.nbytes for _, p in tree_flatten(self.model.parameters())))
        self.model.freeze()
        linear_to_lora_layers(self.model, layers, {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0})
        adapted = {n: m for n, m in self.model.named_modules() if isinstance(m, LoRALinear)}
        arrays = adapter_of({name: Target(m.lora_b.shape[1], m.lora_a.shape[0]) for name, m in adapted.items()})
        renamed = {
            name.removesuffix(".weight").replace("lora_A", "lora_a").replace("lora_B", "lora_b"): array
            for name, array in arrays.items()
        }
        self.model.update(tree_unflatten([(name, mx.array(array.T)) for name, array in renamed.items()]))
        if checkpoint:
            grad_checkpoint(self.model.layers[0])  # here: `train` would wrap the class again at each call

    def step(self, groups: Sequence[Sequence[Example]], warm: bool) -> Figures:
        """One optimizer step on micro-batches, as our weights mask them."""
        return self._train(_corrected([Batch.of(group) for group in groups]), len(groups), corrected_loss, warm)

    def shipped(self, whole: Dataset, max_length: int, warm: bool) -> Figures:
        """A step on one row of `max_length` as mlx_lm.lora makes it, with its own data set, batches and loss."""
        from mlx_lm.tuner.datasets import CacheDataset
        from mlx_lm.tuner.trainer import default_loss, iterate_batches
        from train_speed_data import chat_rows

        rows = chat_rows(whole, self.folder, mask_prompt=False)
        tokens = [len(rows.process(rows[i])[0]) for i in range(len(rows))]
        rows._data = [rows[int(np.argmax(tokens))]]
        with quiet():
            batches = list(iterate_batches(CacheDataset(rows), 1, max_length))
        return self._train(batches, 1, default_loss, warm) | {"width": batches[0][0].shape[1] - 1}

    def profile(self, row: Example) -> Figures:
        """See `Ours.profile`."""
        import mlx.core as mx

        [(tokens, weights)] = _corrected([Batch.of([row])])
        blocks = tokens[:, :-1].reshape(-1, SHORT)
        blocks = mx.concatenate([blocks, blocks[:, -1:]], axis=1)
        last = mx.zeros_like(weights)
        variants: dict[str, tuple[Any, Any, Any]] = {
            "step": (tokens, weights, corrected_loss),
            "without_head": (tokens, weights, headless_loss),
            "without_head_in_blocks": (blocks, last, headless_loss),
            "fixed": (tokens[:, :33], mx.ones((1, 32)), headless_loss),
        }
        seconds = {name: self._train([(t, w)], 1, loss, warm=True)["cpu"] for name, (t, w, loss) in variants.items()}
        self.clock.start()
        mx.eval(corrected_loss(self.model, tokens, weights))
        return seconds | {"forward": self.clock.read()["cpu"]}

    def _train(self, batches: list[Any], accumulation: int, loss: Callable[..., Any], warm: bool) -> Figures:
        """mlx-lm's own loop; `warm`: the step is made once before, so that its trace is not in the time."""
        from mlx.optimizers import Adam
        from mlx_lm.tuner.trainer import TrainingArgs, train

        untimed, reports = len(batches) if warm else 0, _Reports(self.clock)

        def each(**named: Any) -> Iterator[Any]:
            for place, batch in enumerate(batches * (1 + warm)):
                if place in (0, untimed):
                    self.clock.start()
                yield batch

        with tempfile.TemporaryDirectory() as folder, quiet():
            arguments = TrainingArgs(
                iters=untimed + len(batches),
                steps_per_report=1,
                grad_accumulation_steps=accumulation,
                adapter_file=f"{folder}/adapters.safetensors",
            )
            train(self.model, Adam(learning_rate=0.0), [], None, arguments, loss, each, reports)
        return reports.figures(len(batches))


class _Reports:
    """What `train` says after each micro-batch (a TrainingCallback)."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.learned = clock, [0.0]
        self.losses: list[float] = []
        self.read: Figures = {}

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self.read = self.clock.read()
        self.losses.append(info["train_loss"])
        self.learned.append(info["trained_tokens"])

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        raise AssertionError("nothing is held out")

    def figures(self, count: int) -> Figures:
        """Of the last `count` micro-batches; the loss is the mean over their learned tokens."""
        learned = np.diff(self.learned)[-count:]
        return self.read | {"loss": float(np.dot(self.losses[-count:], learned) / learned.sum()), "learned": float(learned.sum())}


def corrected_loss(model: Any, tokens: Any, weights: Any) -> tuple[Any, Any]:
    """mlx-lm's `default_loss`, masked by weights: [B, T + 1], [B, T] -> mean, sum of weights."""
    import mlx.core as mx
    import mlx.nn as nn

    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]) * weights
    count = weights.sum()
    return losses.astype(mx.float32).sum() / count, count


def headless_loss(model: Any, tokens: Any, weights: Any) -> tuple[Any, Any]:
    """What the layers cost alone."""
    import mlx.core as mx

    return model.model(tokens[:, :-1])[:, -1].sum(), mx.array(1.0)


def _corrected(batches: Sequence[Batch]) -> list[Any]:
    """As `iterate_batches` yields them, the shortest first: tokens [B, T + 1], and weights [B, T] in place of lengths."""
    import mlx.core as mx

    ordered = sorted(batches, key=lambda batch: batch.inputs.shape[1])
    return [(mx.array(np.hstack([b.inputs[:, :1], b.targets])), mx.array(b.weights)) for b in ordered]


def ours_config(layers: int, checkpoint: bool, options: dict[str, Any]) -> RunConfig:
    """The same adapter as the peer's; `options` win, grad_checkpoint only where there is checkpointing."""
    values: dict[str, Any] = {"rank": RANK, "alpha": ALPHA, "num_layers": layers, "dtype": "float32"} | (
        {"grad_checkpoint": 1} if checkpoint else {}
    )
    return make_config(values | {n: v for n, v in options.items() if checkpoint or n != "grad_checkpoint"}, "--ours")


def answer(side: Ours | Peer, job: dict[str, Any]) -> Figures:
    """Does one job: a step on a `row` or on `groups` of a data set, a `shipped` step, or a profile."""
    if "row" in job:
        row = read_row(Path(job["row"]))
        return side.profile(row) if job.get("profile") else side.step([[row]], job["warm"])
    dataset = Dataset.open(Path(job["dataset"]))
    if "groups" in job:
        groups = [[dataset.train[i] for i in group] for group in job["groups"]]
        return side.step(groups, job["warm"], job["pack"]) if isinstance(side, Ours) else side.step(groups, job["warm"])
    assert isinstance(side, Peer)
    return side.shipped(dataset, job["length"], job["warm"])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What mlx-lm prints is not shown."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def write_row(path: Path, row: Example) -> None:
    """For another process."""
    np.savez(path, tokens=row.tokens, weights=row.weights)


def read_row(path: Path) -> Example:
    """What `write_row` wrote."""
    with np.load(path) as arrays:
        return Example(arrays["tokens"], arrays["weights"], "rows", "row", ())


def main() -> None:
    """Answers each line of JSON with one; ends with its input."""
    start = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_DATA, (start["memory"],) * 2)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import mlx_finetune.engines.mlx  # noqa: F401  its fast BLAS, for both sides

    kind = Ours if start["side"] == "ours" else Peer
    side = kind(Path(start["model"]), start["layers"], start["checkpoint"], start["options"])
    for line in sys.stdin:
        print(json.dumps(answer(side, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
