"""One step of the optimizer over MLX arrays, by the rules of engines/optimizers.py, and what it remembers."""

from collections.abc import Callable, Mapping

import mlx.core as mx
import numpy as np

from mlx_finetune.config import RunConfig
from mlx_finetune.engines import Arrays
from mlx_finetune.engines.optimizers import decay_of, rate_factor, rule_of, slots_of, update

Parameters = dict[str, mx.array]


class Updater:
    """Changes parameters by their gradients. `updates`: how often it has."""

    def __init__(self, config: RunConfig, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """`names`: of each parameter that of PEFT, by which `shapes` has its shape."""
        self.updates = 0
        self._config, self._names, self._shapes = config, names, shapes
        self._rules = {name: rule_of(config, own, shapes[own]) for name, own in names.items()}
        self._slots: dict[str, Parameters] = {}

    def step(
        self, parameters: Parameters, gradient: Parameters, clip: float, rate: float, put: Callable[[Parameters], None]
    ) -> None:
        """By `clip` times the gradient, which is used up; `put` puts what is new into the model."""
        self.updates += 1
        full = self._config.fine_tune_type == "full"
        for name in list(gradient):
            raw = gradient.pop(name)
            how = self.updates, rate * rate_factor(self._config, self._names[name]), decay_of(self._config, tuple(raw.shape))
            changed = update(self._rules[name], parameters[name], raw * clip, self._slots[name], *how)
            parameters[name], self._slots[name] = changed
            if full:  # one by one, so that old and new weights are not all there at once
                mx.eval(changed)
                put({name: parameters[name]})
        put(parameters)
        mx.eval(parameters, self._slots)

    def state(self) -> Arrays:
        """`slot/NAME` of each parameter, float32."""
        return {f"{s}/{self._names[n]}": np.array(a) for n, slots in self._slots.items() for s, a in slots.items()}

    def load(self, state: Arrays, updates: int) -> None:
        """Goes on after so many updates; what is missing is zero."""
        for name, rule in self._rules.items():
            own = self._names[name]
            shapes = slots_of(rule, self._shapes[own])
            keys = {slot: f"{slot}/{own}" for slot in shapes}
            self._slots[name] = {s: mx.array(state[k]) if (k := keys[s]) in state else mx.zeros(shapes[s]) for s in shapes}
        self.updates = updates
