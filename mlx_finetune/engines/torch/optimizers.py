"""One step of the optimizer over torch parameters, and what it remembers as arrays that either engine takes."""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from mlx_finetune.config import RunConfig
from mlx_finetune.engines import Arrays
from mlx_finetune.engines.optimizers import BETAS, BLOCK, EPSILON, NARROW, SCALES, decay_of, rate_factor, rule_of, slots_of, update
from mlx_finetune.engines.torch.lora import to_numpy

Parameters = Mapping[str, torch.nn.Parameter]
MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}


class Updater(Protocol):
    """Changes parameters by their gradients."""

    def step(self, rate: float) -> None:
        """By each parameter's `grad`."""

    def state(self) -> Arrays:
        """`slot/NAME` of each parameter, float32."""

    def load(self, state: Arrays, step: int) -> None:
        """Goes on after `step` updates; what is missing is zero."""


def updater_of(config: RunConfig, parameters: Parameters) -> Updater:
    """For the optimizer that is asked for."""
    if config.optimizer == "adamw" and parameters:  # torch's own takes no empty list
        return AdamW(config, parameters)
    return AdamW8bit(config, parameters) if config.optimizer == "adamw_8bit" and parameters else Rules(config, parameters)


def _groups(config: RunConfig, parameters: Parameters) -> list[dict[str, Any]]:
    """Parameters that learn at one rate and decay alike."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((rate_factor(config, name), decay_of(config, tuple(parameter.shape))), []).append(parameter)
    return [{"params": found, "weight_decay": decay, "factor": factor} for (factor, decay), found in groups.items()]


class AdamW:
    """torch's own, fused on CUDA."""

    def __init__(self, config: RunConfig, parameters: Parameters) -> None:
        self.parameters = parameters
        fused = next(iter(parameters.values())).is_cuda
        self.optimizer = torch.optim.AdamW(_groups(config, parameters), lr=0.0, betas=BETAS, eps=EPSILON, fused=fused or None)

    def step(self, rate: float) -> None:
        """See `Updater`."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.step()

    def state(self) -> Arrays:
        """See `Updater`."""
        states = {name: self.optimizer.state[parameter] for name, parameter in self.parameters.items()}
        return {f"{slot}/{name}": to_numpy(state[key]) for slot, key in MOMENTS.items() for name, state in states.items()}

    def load(self, state: Arrays, step: int) -> None:
        """See `Updater`."""
        for name, parameter in self.parameters.items():
            moments = {key: _tensor(state, f"{slot}/{name}", parameter.shape, parameter) for slot, key in MOMENTS.items()}
            count = torch.tensor(float(step), device=parameter.device if parameter.is_cuda else "cpu")
            self.optimizer.state[parameter] = {"step": count, **moments}


class AdamW8bit:
    """bitsandbytes' (Dettmers et al. 2022); small arrays stay float32 there.

    What it remembers leaves it as float32, and with it the scale of each block: cut to 8 bits by that it is the same bits again.
    """

    def __init__(self, config: RunConfig, parameters: Parameters) -> None:
        from bitsandbytes import functional
        from bitsandbytes.optim import AdamW8bit as Optimizer

        self.parameters, self._functional = parameters, functional
        groups = _groups(config, parameters)
        self._factors = [group.pop("factor") for group in groups]
        self.optimizer = Optimizer(groups, lr=0.0, betas=BETAS, eps=EPSILON)

    def step(self, rate: float) -> None:
        """See `Updater`."""
        for group, factor in zip(self.optimizer.param_groups, self._factors, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()

    def state(self) -> Arrays:
        """See `Updater`."""
        arrays = {}
        for name, parameter in self.parameters.items():
            kept = self.optimizer.state[parameter]
            for number, slot in enumerate(("m", "v"), 1):
                arrays[f"{slot}/{name}"] = to_numpy(self._wide(kept, number)) if kept else np.zeros(parameter.shape, np.float32)
                if parameter.numel() >= NARROW:
                    blocks = np.zeros(math.ceil(parameter.numel() / BLOCK), np.float32)
                    arrays[f"{slot}{SCALES}/{name}"] = to_numpy(kept[f"absmax{number}"]) if kept else blocks
        return arrays

    def _wide(self, kept: dict[str, Any], number: int) -> torch.Tensor:
        narrow: torch.Tensor = kept[f"state{number}"]
        if narrow.dtype != torch.uint8:
            return narrow
        absmax, code = kept[f"absmax{number}"], kept[f"qmap{number}"]
        wide: torch.Tensor = self._functional.dequantize_blockwise(narrow, absmax=absmax, code=code, blocksize=BLOCK)
        return wide

    def load(self, state: Arrays, step: int) -> None:
        """See `Updater`."""
        self.optimizer.state.clear()
        if not step:
            return
        self.optimizer.check_overrides()
        self.optimizer.initialized = True
        for group_index, group in enumerate(self.optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                self.optimizer.init_state(group, parameter, group_index, place)
        for name, parameter in self.parameters.items():
            kept = self.optimizer.state[parameter]
            kept["step"] = step
            for number, slot in enumerate(("m", "v"), 1):
                scales = state.get(f"{slot}{SCALES}/{name}")
                wide = _tensor(state, f"{slot}/{name}", parameter.shape, parameter)
                self._narrow(kept, number, wide, None if scales is None else torch.from_numpy(scales).to(parameter.device))

    def _narrow(self, kept: dict[str, Any], number: int, wide: torch.Tensor, scales: torch.Tensor | None) -> None:
        if kept[f"state{number}"].dtype != torch.uint8:
            kept[f"state{number}"].copy_(wide)
            return
        code = kept[f"qmap{number}"]
        if scales is None:
            narrow, how = self._functional.quantize_blockwise(wide, code=code, blocksize=BLOCK)
            scales = how.absmax
        else:
            each = scales.repeat_interleave(BLOCK)[: wide.numel()].clamp(min=1e-38)
            narrow = torch.bucketize(wide.flatten() / each, (code[:-1] + code[1:]) / 2).reshape(wide.shape)
        kept[f"state{number}"].copy_(narrow)
        kept[f"absmax{number}"].copy_(scales)


class Rules:
    """Those of optimizers.py, which MLX runs too."""

    def __init__(self, config: RunConfig, parameters: Parameters) -> None:
        self.config, self.parameters = config, parameters
        self._rules = {name: rule_of(config, name, tuple(parameter.shape)) for name, parameter in parameters.items()}
        self._slots: dict[str, dict[str, torch.Tensor]] = {}
        self._steps = 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """See `Updater`."""
        self._steps += 1
        for name, parameter in self.parameters.items():
            how = self._steps, rate * rate_factor(self.config, name), decay_of(self.config, tuple(parameter.shape))
            changed, self._slots[name] = update(self._rules[name], parameter, parameter.grad, self._slots[name], *how)
            parameter.copy_(changed)

    def state(self) -> Arrays:
        """See `Updater`."""
        return {f"{slot}/{name}": to_numpy(array) for name, slots in self._slots.items() for slot, array in slots.items()}

    def load(self, state: Arrays, step: int) -> None:
        """See `Updater`."""
        self._steps = step
        for name, parameter in self.parameters.items():
            shapes = slots_of(self._rules[name], tuple(parameter.shape))
            self._slots[name] = {slot: _tensor(state, f"{slot}/{name}", shape, parameter) for slot, shape in shapes.items()}


def _tensor(state: Arrays, name: str, shape: Any, like: torch.Tensor) -> torch.Tensor:
    if name not in state:
        return torch.zeros(shape, device=like.device)
    return torch.from_numpy(state[name].copy()).to(like.device)
