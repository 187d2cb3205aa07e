"""MlxEngine: mlx-lm's model classes with our LoRA, on Metal, or in float32 on a CPU."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import Batch
from mlx_finetune.engines import Arrays, StepResult, process_peak
from mlx_finetune.engines.adapter import MOMENTS, choose_targets, initial_adapter
from mlx_finetune.engines.mlx.load import load_model

BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch's defaults, so that both engines step alike
SUM_CHUNK = 128


class LoRALinear(nn.Module):
    """linear(x) + scale * B A x, the adapter in float32 whatever the base is in."""

    def __init__(self, linear: nn.Module, shape: tuple[int, int], rank: int, scale: float, dropout: float) -> None:
        """`linear`: the frozen layer, quantised or not; `shape`: its (out, in)."""
        super().__init__()
        self.linear, self.scale = linear, scale
        self.dropout = nn.Dropout(dropout)
        self.lora_A = mx.zeros((rank, shape[1]))
        self.lora_B = mx.zeros((shape[0], rank))

    def __call__(self, x: mx.array) -> mx.array:
        """[..., in] -> [..., out]."""
        low = self.dropout(x.astype(mx.float32)) @ self.lora_A.T
        return self.linear(x) + (self.scale * (low @ self.lora_B.T)).astype(x.dtype)


class MlxEngine:
    """See `Engine`."""

    name = "mlx"

    def __init__(self, model: Path, config: RunConfig) -> None:
        """Loads the folder `model` and puts a fresh adapter on it."""
        self.config = config
        self.on_gpu = mx.default_device() == mx.Device(mx.gpu)
        self.device = "Metal" if mx.metal.is_available() else "gpu" if self.on_gpu else "cpu"
        dtype = config.dtype if config.dtype != "auto" else None if self.on_gpu else "float32"
        self.model = load_model(model, dtype)
        self.model.freeze()
        linears = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear | nn.QuantizedLinear)}
        self.shapes = choose_targets({n: _shape(m) for n, m in linears.items()}, config)
        scale = config.alpha / config.rank
        adapted = [(n, LoRALinear(linears[n], shape, config.rank, scale, config.dropout)) for n, shape in self.shapes.items()]
        self.model.update_modules(tree_unflatten(adapted))
        self.model.eval()  # dropout acts inside a step only
        adapter = initial_adapter(self.shapes, config.rank, config.seed)
        self.load_state({f"adapter/{name}": array for name, array in adapter.items()}, step=0)

    def step(self, micro_batches: Sequence[Batch], learning_rate: float, seed: int) -> StepResult:
        """See `Engine.step`."""
        mx.random.seed(seed)
        self.model.train()
        total = sum(batch.learned for batch in micro_batches)
        loss, gradient = 0.0, {name: mx.zeros_like(p) for name, p in self._parameters().items()}
        value_and_grad = nn.value_and_grad(self.model, self._loss)
        for batch in micro_batches:
            part, fresh = value_and_grad(*_arrays(batch), 1 / total)
            gradient = {name: gradient[name] + value for name, value in tree_flatten(fresh)}
            mx.eval(part, gradient)
            loss += _number(part)
        self.model.eval()
        norm = _number(mx.sqrt(mx.stack([mx.square(g).sum() for g in gradient.values()]).sum()))
        if norm < float("inf"):
            self._update(gradient, min(1.0, self.config.max_grad_norm / (norm + 1e-6)), learning_rate)
        mx.clear_cache()  # shapes differ from step to step: what they leave cached is seldom used again
        return StepResult(loss, sum(int((batch.weights > 0).sum()) for batch in micro_batches), norm)

    def loss_sum(self, batch: Batch) -> float:
        """See `Engine.loss_sum`."""
        return _number(self._loss(*_arrays(batch), 1.0))

    def generate(self, prompt: Sequence[int], limit: int, stop: frozenset[int]) -> Iterator[int]:
        """See `Engine.generate`."""
        tokens, cache = mx.array([list(map(int, prompt))]), make_prompt_cache(self.model)
        for _ in range(limit):
            last = mx.array([tokens.shape[1] - 1])
            token = int(np.argmax(np.array(self._logits(tokens, last, cache=cache)[0, 0])))
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

    def _loss(self, inputs: mx.array, columns: mx.array, targets: mx.array, weights: mx.array, scale: float) -> mx.array:
        logits = self._logits(inputs, columns)
        chosen = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
        return ((_log_sum_exp(logits) - chosen) * weights).sum() * scale

    def _logits(self, inputs: mx.array, columns: mx.array, **named: Any) -> mx.array:
        """[B, T] -> float32 [B, n, V]: the head is computed for `columns` [n] alone."""
        backbone = self.model["model"]
        self.model["model"] = _Columns(backbone, columns)
        try:
            return self.model(inputs, **named).astype(mx.float32)
        finally:
            self.model["model"] = backbone

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


def _shape(linear: nn.Module) -> tuple[int, int]:
    rows, columns = linear.weight.shape
    return (rows, columns * 32 // linear.bits) if isinstance(linear, nn.QuantizedLinear) else (rows, columns)


class _Columns:
    """Stands in for the layers of a model and hands on only the columns that are learned.

    Whatever the model does after its layers (head, tied or not, scale, soft cap) it does column by column, so the loss is the
    same and the largest matrix product and the largest array shrink to what is learned.
    """

    def __init__(self, backbone: nn.Module, columns: mx.array) -> None:
        self._backbone, self._columns = backbone, columns

    def __call__(self, *arguments: Any, **named: Any) -> mx.array:
        return self._backbone(*arguments, **named)[:, self._columns]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)


def _arrays(batch: Batch) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    columns = batch.columns
    return mx.array(batch.inputs), mx.array(columns), mx.array(batch.targets[:, columns]), mx.array(batch.weights[:, columns])


def _number(scalar: mx.array) -> float:
    value = scalar.item()
    assert isinstance(value, float)
    return value


def _log_sum_exp(logits: mx.array) -> mx.array:
    """[..., V] -> [...]. In two levels: MLX's CPU sum over 49,152 entries in one pass is off by up to 3e-4."""
    vocabulary = logits.shape[-1]
    padding = -vocabulary % SUM_CHUNK
    if padding:
        logits = mx.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, padding)], constant_values=-float("inf"))
    chunks = logits.reshape(*logits.shape[:-1], -1, SUM_CHUNK)
    return mx.logsumexp(mx.logsumexp(chunks, axis=-1), axis=-1)
