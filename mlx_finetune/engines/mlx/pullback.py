"""From the parameters of an mlx-lm model back to the tensors of the Hugging Face checkpoint that they were made of.

A class of mlx-lm renames, stacks, splits, transposes and shifts tensors as it reads them, in its `sanitize`. Its own gradient
carries a change of parameters back through all of that, so no table per architecture is needed, and applying `sanitize` to
what came back must give the change again, else nothing is written.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

Shapes = Mapping[str, tuple[int, ...]]
Weights = dict[str, mx.array]
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # in a name: of a layer, or of an expert
ROWS, COLUMNS = 4, 6  # of the reduced matrices of experts: enough for halves, and for a transposed one to be seen
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
        self.slices: dict[str, int] = {}  # parameters [E, n, in] that are rows of a tensor [E, rows, in], from this row on
        self._scaled: set[str] = set()
        self._find(list(parameters))

    def _sanitize(self, weights: Mapping[str, mx.array], copied: bool = True) -> Weights:
        """Some classes change what they are given in place, so they are given other objects of the same numbers."""
        own = {name: mx.broadcast_to(value, value.shape) if copied else value for name, value in weights.items()}
        model: Any = self._make()
        try:
            return dict(model.sanitize(own)) if hasattr(model, "sanitize") else own
        except KeyError as error:
            raise Unmapped(f"{error.args[0]}, of which mlx-lm's class makes a parameter, is not in the checkpoint") from error
        except (IndexError, ValueError) as error:
            raise Unmapped(f"mlx-lm's class does not take these tensors: {' '.join(str(error).split())[:160]}") from error

    def _find(self, parameters: list[str]) -> None:
        plain = _zeros(self._shapes)
        made = self._sanitize(plain)
        if missing := [name for name in parameters if name not in made]:
            raise Unmapped(f"{missing[0]} is not made of the tensors of the checkpoint")
        self.shapes = {name: tuple(made.pop(name).shape) for name in parameters}
        kept = self._sanitize(plain, copied=False)
        objects = {id(array): name for name, array in plain.items()}
        unmoved = {name: objects.get(id(kept[name])) for name in parameters}
        del made, kept
        seen = _reduced(self._shapes)
        try:
            rows = self._mark(seen, parameters)
        except Unmapped:  # a class that is told how large the tensors of an expert are
            seen = self._shapes
            rows = self._mark(seen, parameters)
        orders = {}
        for parameter in parameters:
            if parameter not in rows:
                self._scaled.add(parameter)
                self.of[parameter] = self._heard_of(parameter)
                continue
            order, is_shifted = rows[parameter]
            self.of[parameter] = tuple(sorted(set(order)))
            if unmoved[parameter] == order[0] and len(self.of[parameter]) == 1 and not is_shifted:
                self.same.add(parameter)
            if _could_be_experts(self.shapes[parameter], [self._shapes[name] for name in order]):
                orders[parameter] = order
        self._prove(orders, seen)

    def _mark(self, shapes: Shapes, parameters: Iterable[str]) -> dict[str, tuple[tuple[str, ...], bool]]:
        """Of each parameter that is not scaled its tensors, in the order of its rows where each row is of one, and whether a
        constant is added to them."""
        names = dict(zip(map(float, _markers(len(shapes))), shapes, strict=True))
        marked = self._sanitize({name: _constant(value, shapes[name]) for value, name in names.items()})
        zero = self._sanitize(_zeros(shapes))
        found = {}
        for parameter in parameters:
            if parameter not in marked:
                raise Unmapped(f"{parameter} is made of tensors of some sizes only")
            rows, added = _corners(marked.pop(parameter)), _corners(zero.pop(parameter))
            mx.clear_cache()
            rows = rows if names.keys() >= set(np.unique(rows).tolist()) else rows - added  # such as 1, added to a norm
            values = np.unique(rows).tolist()
            if not values and np.prod(self.shapes[parameter]):
                raise Unmapped(f"{parameter} is cut out at places that do not depend on how large its tensors are")
            if not names.keys() >= set(values):
                continue
            values = rows[:, 0].tolist() if len(values) == len(rows) and (rows == rows[:, :1]).all() else values
            found[parameter] = tuple(names[value] for value in values), bool(added.any())
        return found

    def _prove(self, orders: Mapping[str, tuple[str, ...]], seen: Shapes) -> None:
        """Which of these are stacks or slices: all numbers of `seen`, the smaller tensors, are looked at, and then those of one
        parameter of each kind, such as of all layers, in tensors as large as they are."""
        first = self._first_rows(orders, seen, whole=True)
        ones = {_kind(name, orders[name], self._shapes): name for name in first}
        again = self._first_rows({name: orders[name] for name in ones.values()}, self._shapes, whole=False)
        for parameter, row in first.items():
            order = orders[parameter]
            one = ones[_kind(parameter, order, self._shapes)]
            if one in again and len(order) > 1:
                self.of[parameter] = order
                self.stacks.add(parameter)
            elif one in again:
                large, small = self._shapes[order[0]][1], seen[order[0]][1]
                if again[one] * small == first[one] * large:
                    self.slices[parameter] = row * large // small

    def _first_rows(self, orders: Mapping[str, tuple[str, ...]], shapes: Shapes, whole: bool) -> dict[str, int]:
        """Those whose numbers stand as in their tensors; and in which row of a tensor of all experts the first of them.

        Each number says where it stood, one axis after the other. `whole`: all are compared, else those of two experts.
        """
        first = dict.fromkeys(orders, 0)
        for axis in range(0 if whole else 1, max((len(self.shapes[name]) for name in orders), default=0)):
            numbered = _zeros(shapes)
            for order in (orders[name] for name in first):
                for place, tensor in enumerate(order):
                    numbered[tensor] = _places(shapes[tensor], axis - (len(order) > 1), place)
            made = self._sanitize(numbered) if first else {}
            for parameter in list(first):
                found = made.pop(parameter)
                shape = found.shape
                if axis >= len(shape):
                    continue
                found = found if whole else mx.stack([found[0], found[-1]])
                row = int(np.array(found[0, 0].reshape(-1)[0])) if axis == 1 and len(orders[parameter]) == 1 else 0
                if mx.array_equal(found - row, mx.broadcast_to(_places(shape, axis)[: len(found)], found.shape)).item():
                    first[parameter] += row
                else:
                    del first[parameter]
                del found
                mx.clear_cache()
        return first

    def _heard_of(self, parameter: str) -> tuple[str, ...]:
        """Tensors that a change of the parameter reaches, where markers cannot tell: it is scaled."""
        names = list(self._shapes)

        def made(*arrays: mx.array) -> list[mx.array]:
            return [self._sanitize(dict(zip(names, arrays, strict=True)))[parameter]]

        zeros = [_constant(0.0, self._shapes[name]) for name in names]
        try:
            _, gradients = mx.vjp(made, zeros, [_constant(1.0, self.shapes[parameter])])
        except ValueError as error:
            raise _underivable(parameter, error) from error
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
        try:
            if self._scaled & set(parameters):  # J J^T of a scaled permutation is the square of the scale, number by number
                _, once = mx.vjp(made, zeros, [mx.ones(change.shape) for change in wanted])
                _, squares = mx.jvp(made, zeros, once)
                _, pulled = mx.vjp(made, zeros, [change / square for change, square in zip(wanted, squares, strict=True)])
            else:
                _, pulled = mx.vjp(made, zeros, wanted)
            _, again = mx.jvp(made, zeros, pulled)
        except ValueError as reason:
            raise _underivable(parameters[0], reason) from reason
        for parameter, change, found in zip(parameters, wanted, again, strict=True):
            error, largest = (float(np.array(mx.abs(array).max())) for array in (found - change, change))
            if not error <= EXACT * largest:
                raise Unmapped(f"{parameter} is made by mixing numbers of {', '.join(self.of[parameter][:2])}")
        return dict(zip(needed, pulled, strict=True))


def shifted(make: Callable[[], nn.Module], shapes: Shapes) -> dict[str, tuple[str, float]]:
    """Vectors to which `sanitize` adds a constant, such as 1 to norms: the tensor that each is made of, and the constant."""
    of_none = Sources(make, shapes, ())
    zero = of_none._sanitize(_zeros(shapes))
    vectors = [name for name, array in zero.items() if array.ndim == 1 and array.size]
    made = of_none._mark(shapes, vectors)
    return {name: (order[0], float(np.array(zero[name][0]))) for name, (order, added) in made.items() if added and len(order) == 1}


def _could_be_experts(shape: tuple[int, ...], stored: Sequence[tuple[int, ...]]) -> bool:
    """Whether a parameter of this shape may be all these tensors one after the other, or rows of one tensor of all experts."""
    if len(stored) > 1:
        return len(shape) > 1 and len(stored) == shape[0] and set(stored) == {shape[1:]}
    of = stored[0]
    return len(shape) == len(of) == 3 and (shape[0], shape[2]) == (of[0], of[2]) and shape[1] <= of[1]


def _kind(parameter: str, order: Sequence[str], shapes: Shapes) -> tuple[Any, ...]:
    """The same for the parameters of one name in all layers, where they are made alike."""
    return NUMBER.sub("", parameter), NUMBER.sub("", order[0]), len(order), shapes[order[0]]


def _reduced(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """With small matrices of experts, those whose names have two numbers, or that are three-dimensional: all others as they are."""
    small = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and len(NUMBER.findall(name)) > 1 and shape[0] >= 2 and shape[1] >= COLUMNS:
            shape = (2, COLUMNS)
        elif len(shape) == 3 and shape[1] % ROWS == 0 and shape[2] >= COLUMNS:
            shape = (shape[0], ROWS, COLUMNS)
        small[name] = shape
    return small


def _places(shape: Sequence[int], axis: int, otherwise: int = 0) -> mx.array:
    """Each number its place along the axis; below axis 0 all of them `otherwise`. Takes no memory until it is computed with."""
    if not 0 <= axis < len(shape):
        return _constant(float(otherwise), shape)
    index = mx.arange(shape[axis], dtype=mx.float32).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return mx.broadcast_to(index, tuple(shape))


def _underivable(parameter: str, error: ValueError) -> Unmapped:
    return Unmapped(f"{parameter} is made by what has no derivative, as of packed numbers ({' '.join(str(error).split())[:80]})")


def _markers(count: int) -> np.ndarray:
    """Different numbers, float32 exactly; none is one more, twice or half of another, and adding 1 to them is exact.

    Even whole numbers and an odd number of 1024ths, from 2 on.
    """
    random = np.random.default_rng(7)
    drawn = np.unique(random.integers(0, 1 << 21, 2 * count + 64))  # below 8194 with a step of 2^-10: 24 bits
    found = 2 * (1 + drawn // 512) + (2 * (drawn % 512) + 1) / 1024
    return random.permutation(found)[:count].astype(np.float32)


def _zeros(shapes: Shapes) -> Weights:
    return {name: _constant(0.0, shape) for name, shape in shapes.items()}


def _constant(value: float, shape: Sequence[int]) -> mx.array:
    """Takes no memory until it is computed with."""
    return mx.broadcast_to(mx.array(value, mx.float32), tuple(shape))


def _corners(array: mx.array) -> np.ndarray:
    """First and last number of each row, by the first axis: [rows, n]. Tensors are told apart by constants, so these suffice."""
    if array.ndim < 2:
        return np.array(array.reshape(-1, 1).astype(mx.float32))
    ends = mx.concatenate([array[..., :1], array[..., -1:]], axis=-1).reshape(array.shape[0], -1)
    return np.array(ends.astype(mx.float32))
