"""MlxEngine: mlx-lm's model classes with our LoRA, on Metal, or in float32 on a CPU."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import Batch
from mlx_finetune.data.trees import Placed, Tree, placed_rows, plan, tokens_of
from mlx_finetune.engines import TRUNK, Arrays, StepResult, process_peak
from mlx_finetune.engines.adapter import MOMENTS, choose_targets, initial_adapter
from mlx_finetune.engines.mlx.attention import Layout, follows_layout, install
from mlx_finetune.engines.mlx.load import load_model
from mlx_finetune.engines.mlx.lora import LoRALinear, set_dropout
from mlx_finetune.engines.mlx.loss import Caught, Given, loss_sum, value_of
from mlx_finetune.engines.mlx.recompute import recomputed
from mlx_finetune.engines.mlx.trunk import Trunk
from mlx_finetune.errors import UserError
from mlx_finetune.models.weights import fingerprint

WORTH = 0.95  # of the tokens of rows: what trees must come down to, for their attention is cut into more parts
BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch's defaults, so that both engines step alike
Parameters = dict[str, mx.array]


@dataclass(frozen=True)
class Work:
    """One forward pass: which tokens, what each sees, and where something is learned."""

    inputs: mx.array  # int32 [B, T]
    rows: tuple[Placed, ...]
    layout: Layout | None  # None: each sees all before it in its row
    places: mx.array  # int32 [n], in the flattened inputs
    targets: mx.array  # int32 [n]
    weights: mx.array  # float32 [n]

    @classmethod
    def of_rows(cls, batch: Batch, by_layout: bool) -> "Work":
        """What stands behind the last learned token of all is not computed."""
        width = int(batch.columns[-1]) + 1
        weights = batch.weights[:, :width].reshape(-1)
        places = np.flatnonzero(weights > 0).astype(np.int32)
        arrays = places, batch.targets[:, :width].reshape(-1)[places], weights[places]
        layout = Layout.rows(width) if by_layout and width > 1 else None
        learned = (mx.array(array) for array in arrays)
        return cls(mx.array(batch.inputs[:, :width]), placed_rows(batch, width), layout, *learned)

    @classmethod
    def of_tree(cls, tree: Tree) -> "Work":
        """The whole tree is one row."""
        layout = Layout(tree.segments, tree.positions)
        learned = (mx.array(array) for array in (tree.places, tree.targets, tree.weights))
        return cls(mx.array(tree.inputs[None]), tree.rows, layout, *learned)

    def layouts(self, layers: int) -> list[Layout] | None:
        """As the model's layers take caches."""
        return None if self.layout is None else [self.layout] * layers


class MlxEngine:
    """See `Engine`."""

    name = "mlx"

    def __init__(self, model: Path, config: RunConfig) -> None:
        """Loads the folder `model` and puts a fresh adapter on it."""
        self.config = config
        self.on_gpu = mx.default_device() == mx.Device(mx.gpu)
        _bound_buffers()
        self.device = "Metal" if mx.metal.is_available() else "gpu" if self.on_gpu else "cpu"
        dtype = config.dtype if config.dtype != "auto" else None if self.on_gpu else "float32"
        self.model = load_model(model, dtype)
        self.model.freeze()
        linears = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear | nn.QuantizedLinear)}
        self.shapes = choose_targets({n: _shape(m) for n, m in linears.items()}, config)
        scale = config.alpha / config.rank
        adapted = [(n, LoRALinear(linears[n], shape, config.rank, scale, config.dropout)) for n, shape in self.shapes.items()]
        self.model.update_modules(tree_unflatten(adapted))
        self.model.eval()
        self._choose_paths(model)
        self._trunk: Trunk | None = None
        if config.cache_trunk:
            what = {"model": fingerprint(model), "dtype": dtype or "as stored", "attention": config.attention}
            self._trunk = Trunk(self.model, Path(config.out) / TRUNK, what)
        adapter = initial_adapter(self.shapes, config.rank, config.seed)
        self.load_state({f"adapter/{name}": array for name, array in adapter.items()}, step=0)

    def _choose_paths(self, folder: Path) -> None:
        """Which attention, and whether rows may be folded into trees; refuses by name what this model cannot."""
        able, config = follows_layout(self.model), self.config
        for name, asked in (
            ("attention: blocks", config.attention == "blocks"),
            ("share_prefixes: always", config.share_prefixes == "always"),
        ):
            if asked and not able:
                hint = "its attention is its own: leave the setting out"
                raise UserError(f"{folder}: {name} is not there for this architecture", hint=hint)
        self._by_layout = able and (config.attention == "blocks" or (config.attention == "auto" and not self.on_gpu))
        self._in_trees = able and config.share_prefixes != "never"
        if able:
            install(self.model)

    def step(self, micro_batches: Sequence[Batch], learning_rate: float, seed: int) -> StepResult:
        """See `Engine.step`."""
        total = sum(batch.learned for batch in micro_batches)
        parameters = self._parameters()
        loss, gradient = 0.0, {name: mx.zeros_like(p) for name, p in parameters.items()}
        works = self._works(micro_batches)
        for number, work in enumerate(works):
            set_dropout(self.model, int(np.random.default_rng((seed, number)).integers(2**63)))
            part, fresh = mx.value_and_grad(self._loss)(parameters, work, 1 / total, self._states(work))
            gradient = {name: value + fresh[name] for name, value in gradient.items()}
            mx.eval(part, gradient)
            self._set(parameters)  # computing layers again leaves others behind
            loss += _number(part)
        set_dropout(self.model, None)
        norm = _number(mx.sqrt(mx.stack([mx.square(g).sum() for g in gradient.values()]).sum()))
        if norm < float("inf"):
            self._update(gradient, min(1.0, self.config.max_grad_norm / (norm + 1e-6)), learning_rate)
        mx.clear_cache()  # shapes differ from step to step: what they leave cached is seldom used again
        learned = sum(int((batch.weights > 0).sum()) for batch in micro_batches)
        return StepResult(loss, learned, norm, sum(work.inputs.size for work in works))

    def loss_sum(self, batch: Batch) -> float:
        """See `Engine.loss_sum`."""
        work = Work.of_rows(batch, self._by_layout)
        with self._below(self._states(work)):
            hidden = self._hidden(work)
        mx.eval(hidden)
        return value_of(self._head, hidden, work.targets, work.weights)

    def _works(self, batches: Sequence[Batch]) -> list[Work]:
        """As trees where that is less to compute, else as the rows that they are."""
        if self._in_trees:
            most = self.config.pack_length or max(batch.inputs.size for batch in batches)
            trees = plan(batches, most)
            if sum(len(tree.inputs) for tree in trees) < WORTH * tokens_of(batches):
                return [Work.of_tree(tree) for tree in trees]
        return [Work.of_rows(batch, self._by_layout) for batch in batches]

    def generate(self, prompt: Sequence[int], limit: int, stop: frozenset[int]) -> Iterator[int]:
        """See `Engine.generate`."""
        tokens, cache = mx.array([list(map(int, prompt))]), make_prompt_cache(self.model)
        for _ in range(limit):
            caught = Caught(self.model["model"])
            with _replaced(self.model, caught):
                self.model(tokens, cache=cache)
            assert caught.hidden is not None
            token = int(np.argmax(np.array(self._head(caught.hidden[0, -1:])[0].astype(mx.float32))))
            if token in stop:
                return
            yield token
            tokens = mx.array([[token]])

    def state(self) -> Arrays:
        """See `Engine.state`."""
        kinds = {"adapter": self._parameters(), **self._moments}
        return {f"{kind}/{n}.weight": np.array(array) for kind, arrays in kinds.items() for n, array in arrays.items()}

    def load_state(self, state: Arrays, step: int) -> None:
        """See `Engine.load_state`."""
        zeros = {name: mx.zeros_like(p) for name, p in self._parameters().items()}
        self._set({name: mx.array(state[f"adapter/{name}.weight"]) for name in zeros})
        self._moments = {
            kind: {n: mx.array(state[f"{kind}/{n}.weight"]) if f"{kind}/{n}.weight" in state else z for n, z in zeros.items()}
            for kind in MOMENTS
        }
        self._steps = step

    def peak_memory(self) -> int:
        """See `Engine.peak_memory`."""
        return int(mx.get_peak_memory()) if self.on_gpu else process_peak()

    def _states(self, work: Work) -> mx.array | None:
        """What enters the first layer with something to learn, where that is kept from epoch to epoch."""
        if self._trunk is None:
            return None
        return self._trunk.states(self.model, work.inputs, work.layouts(len(self.model.layers)), work.rows)

    def _below(self, states: mx.array | None) -> AbstractContextManager[None]:
        """Inside, layers with nothing to learn are not computed where `states` is what comes out of them."""
        return self._trunk.given(states) if self._trunk and states is not None else nullcontext()

    def _loss(self, parameters: Parameters, work: Work, scale: float, states: mx.array | None) -> mx.array:
        self._set(parameters)
        with recomputed(self.model["model"], self.config.grad_checkpoint), self._below(states):
            hidden = self._hidden(work)
        return loss_sum(self._head, hidden, work.targets, work.weights) * scale

    def _hidden(self, work: Work) -> mx.array:
        """[n, D]: what the head is to make logits of."""
        caught = Caught(self.model["model"])
        with _replaced(self.model, caught):
            self.model(work.inputs, cache=work.layouts(len(self.model.layers)))
        assert caught.hidden is not None
        return caught.hidden.reshape(-1, caught.hidden.shape[-1])[work.places]

    def _head(self, hidden: mx.array) -> mx.array:
        """[n, D] -> [n, V]."""
        with _replaced(self.model, Given(self.model["model"], hidden[None])):
            logits: mx.array = self.model(mx.zeros((1, 1), mx.int32))[0]
        return logits

    def _update(self, gradient: dict[str, mx.array], clip: float, learning_rate: float) -> None:
        """AdamW with bias correction and decoupled decay (Loshchilov and Hutter 2019), as torch has it."""
        self._steps += 1
        first, second = (1 - beta**self._steps for beta in BETAS)
        parameters = self._parameters()
        for name, raw in gradient.items():
            g = raw * clip
            m = self._moments["m"][name] = BETAS[0] * self._moments["m"][name] + (1 - BETAS[0]) * g
            v = self._moments["v"][name] = BETAS[1] * self._moments["v"][name] + (1 - BETAS[1]) * mx.square(g)
            decayed = parameters[name] * (1 - learning_rate * self.config.weight_decay)
            parameters[name] = decayed - (learning_rate / first) * m / (mx.sqrt(v / second) + EPSILON)
        self._set(parameters)
        mx.eval(parameters, self._moments)

    def _parameters(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self.model.trainable_parameters()))

    def _set(self, parameters: dict[str, mx.array]) -> None:
        self.model.update(tree_unflatten(list(parameters.items())))


def _bound_buffers() -> None:
    """On Metal: weights stay in memory that is not swapped, and what is freed is kept for reuse up to a tenth of it."""
    if mx.metal.is_available():
        usable = int(mx.device_info()["max_recommended_working_set_size"])
        mx.set_wired_limit(usable)
        mx.set_cache_limit(usable // 10)


def _shape(linear: nn.Module) -> tuple[int, int]:
    rows, columns = linear.weight.shape
    return (rows, columns * 32 // linear.bits) if isinstance(linear, nn.QuantizedLinear) else (rows, columns)


@contextmanager
def _replaced(model: nn.Module, layers: Any) -> Iterator[None]:
    """Inside, `layers` stands in for the model's own."""
    own = model["model"]
    model["model"] = layers
    try:
        yield
    finally:
        model["model"] = own


def _number(scalar: mx.array) -> float:
    value = scalar.item()
    assert isinstance(value, float)
    return value
