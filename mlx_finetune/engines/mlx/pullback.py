"""From the parameters of an mlx-lm model back to the tensors of the Hugging Face checkpoint that they were made of.

A class of mlx-lm renames, stacks, splits, transposes and shifts tensors as it reads them, in its `sanitize`. Its own gradient
carries a change of parameters back through all of that, so no table per architecture is needed, and applying `sanitize` to
what came back must give the change again, else nothing is written.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

Shapes = Mapping[str, tuple[int, ...]]
Weights = dict[str, mx.array]
EXACT = 1e-4  # of the largest number of a change: float32 sums in another order; a wrong map is off by all of it


class Unmapped(ValueError):
    """A parameter whose change cannot be carried back."""


class Sources:
    """Which tensors of the checkpoint each of some parameters is made of."""

    def __init__(self, make: Callable[[], nn.Module], shapes: Shapes, parameters: Iterable[str]) -> None:
        """`make`: a fresh model, not evaluated; `shapes`: of every tensor of the checkpoint; `parameters`: by the model's names.

        Raises:
            Unmapped: a parameter that `sanitize` does not make of these tensors.
        """
        self._make, self._shapes = make, dict(shapes)
        self.of: dict[str, tuple[str, ...]] = {}
        self.same: set[str] = set()  # parameters that are a tensor as it is, perhaps under another name
        self.stacks: set[str] = set()  # parameters that are tensors of one shape, one after the other: of experts
        self._scaled: set[str] = set()
        self._find(list(parameters))

    def _sanitize(self, weights: Mapping[str, mx.array], copied: bool = True) -> Weights:
        """Some classes change what they are given in place, so they are given copies."""
        own = {name: value + 0 if copied else value for name, value in weights.items()}
        model: Any = self._make()
        return dict(model.sanitize(own)) if hasattr(model, "sanitize") else own

    def _find(self, parameters: list[str]) -> None:
        names = list(self._shapes)
        plain = {name: _constant(0.0, self._shapes[name]) for name in names}
        zero = self._sanitize(plain)
        if missing := [name for name in parameters if name not in zero]:
            raise Unmapped(f"{missing[0]} is not made of the tensors of the checkpoint")
        self.shapes = {name: tuple(zero[name].shape) for name in parameters}
        values = _markers(len(names))
        name_of = dict(zip(map(float, values), names, strict=True))
        marked = self._sanitize({n: _constant(float(v), self._shapes[n]) for n, v in zip(names, values, strict=True)})
        kept = self._sanitize(plain, copied=False)
        objects = {id(array): name for name, array in plain.items()}
        for parameter in parameters:
            rows = _corners(marked.pop(parameter))
            if not set(np.unique(rows).tolist()) <= name_of.keys():  # a constant was added, such as 1 to a norm
                rows = rows - _corners(zero[parameter])
            mx.clear_cache()
            found = np.unique(rows).tolist()
            if not set(found) <= name_of.keys():
                self._scaled.add(parameter)
                continue
            self.of[parameter] = tuple(name_of[value] for value in found)
            is_same = objects.get(id(kept.get(parameter))) == self.of[parameter][0] and len(found) == 1
            if is_same and not _corners(zero[parameter]).any():
                self.same.add(parameter)
            elif (rows == rows[:, :1]).all() and len(found) == len(rows) > 1:
                self._check_stack(parameter, tuple(name_of[value] for value in rows[:, 0].tolist()))
        for parameter in self._scaled:
            self.of[parameter] = self._heard_of(parameter)

    def _check_stack(self, parameter: str, order: tuple[str, ...]) -> None:
        """A stack where each tensor stands as it is: seen on one of them, filled with numbers that are all different."""
        shape = self.shapes[parameter]
        if len(shape) < 2 or any(self._shapes[name] != shape[1:] for name in order):
            return
        numbers = mx.arange(int(np.prod(shape[1:])), dtype=mx.float32).reshape(shape[1:])
        weights = {name: _constant(0.0, self._shapes[name]) for name in self._shapes} | {order[0]: numbers}
        first = self._sanitize(weights)[parameter][0]
        if mx.array_equal(first, numbers).item():
            self.of[parameter] = order
            self.stacks.add(parameter)

    def _heard_of(self, parameter: str) -> tuple[str, ...]:
        """Tensors that a change of the parameter reaches, where markers cannot tell: it is scaled."""
        names = list(self._shapes)

        def made(*arrays: mx.array) -> list[mx.array]:
            return [self._sanitize(dict(zip(names, arrays, strict=True)))[parameter]]

        zeros = [_constant(0.0, self._shapes[name]) for name in names]
        _, gradients = mx.vjp(made, zeros, [_constant(1.0, self.shapes[parameter])])
        return tuple(name for name, gradient in zip(names, gradients, strict=True) if bool(np.array(gradient.any())))

    def groups(self) -> list[list[str]]:
        """Parameters in groups that share no tensor, in the order in which they were asked for."""
        owner: dict[str, int] = {}
        groups: dict[int, list[str]] = {}
        for number, parameter in enumerate(self.of):
            groups[number] = [parameter]
            for tensor in self.of[parameter]:
                if tensor in owner and owner[tensor] != number:
                    other = owner[tensor]
                    groups[number] = groups.pop(other) + groups[number]
                    owner |= {name: number for name, group in owner.items() if group == other}
                owner[tensor] = number
        return list(groups.values())

    def pull(self, parameters: Sequence[str], changes: Sequence[mx.array]) -> Weights:
        """What to add to the tensors of one group so that each of its parameters changes by so much. float32.

        Raises:
            Unmapped: `sanitize` mixes numbers, so that there is no such change.
        """
        needed = sorted({tensor for parameter in parameters for tensor in self.of[parameter]})
        others = {name: _constant(0.0, shape) for name, shape in self._shapes.items() if name not in needed}

        def made(*arrays: mx.array) -> list[mx.array]:
            weights = self._sanitize(others | dict(zip(needed, arrays, strict=True)))
            return [weights[parameter] for parameter in parameters]

        zeros = [_constant(0.0, self._shapes[name]) for name in needed]
        wanted = [change.astype(mx.float32) for change in changes]
        if self._scaled & set(parameters):  # J J^T of a scaled permutation is the square of the scale, number by number
            _, once = mx.vjp(made, zeros, [mx.ones(change.shape) for change in wanted])
            _, squares = mx.jvp(made, zeros, once)
            _, pulled = mx.vjp(made, zeros, [change / square for change, square in zip(wanted, squares, strict=True)])
        else:
            _, pulled = mx.vjp(made, zeros, wanted)
        _, again = mx.jvp(made, zeros, pulled)
        for parameter, change, found in zip(parameters, wanted, again, strict=True):
            error, largest = (float(np.array(mx.abs(array).max())) for array in (found - change, change))
            if not error <= EXACT * largest:
                raise Unmapped(f"{parameter} is made by mixing numbers of {', '.join(self.of[parameter][:2])}")
        return dict(zip(needed, pulled, strict=True))


def _markers(count: int) -> np.ndarray:
    """Numbers that are all different, and no two of which differ by what a class may add."""
    random = np.random.default_rng(7)
    found = np.unique(random.uniform(1.0, 1e4, 2 * count + 64).astype(np.float32))
    return random.permutation(found)[:count]


def _constant(value: float, shape: Sequence[int]) -> mx.array:
    """Takes no memory until it is computed with."""
    return mx.broadcast_to(mx.array(value, mx.float32), tuple(shape))


def _corners(array: mx.array) -> np.ndarray:
    """First and last number of each row, by the first axis: [rows, n]. Tensors are told apart by constants, so these suffice."""
    flat = array.reshape(array.shape[0] if array.ndim else 1, -1, array.shape[-1] if array.ndim > 1 else 1)
    ends = mx.concatenate([flat[:, :, :1], flat[:, :, -1:]], axis=2).reshape(flat.shape[0], -1)
    return np.array(ends.astype(mx.float32))
