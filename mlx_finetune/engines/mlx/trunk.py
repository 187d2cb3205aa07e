"""Hidden states that enter the first layer with something to learn: the same in every epoch, so kept on the disk."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_finetune.data.trees import Placed
from mlx_finetune.engines.mlx.parts import Parts
from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json, write_json

KINDS = {mx.float32: "float32", mx.bfloat16: "bfloat16", mx.float16: "float16"}
STORED: dict[mx.Dtype, np.dtype[Any]] = {
    mx.float32: np.dtype(np.float32),
    mx.bfloat16: np.dtype(np.uint16),
    mx.float16: np.dtype(np.float16),
}


FORMAT = 2  # of the index


class Trunk:
    """The frozen layers below, and a file of what they make of each row of tokens.

    Rows stand in `states.bin` one after the other; a line of `index.jsonl`, written behind them, says where, and their digest.
    What a crash or a power cut has left otherwise is written again.
    """

    def __init__(self, parts: Parts, folder: Path, key: dict[str, Any]) -> None:
        """`key`: all that the states depend on beside the tokens; where `folder` was kept for another, it begins anew.

        Raises:
            UserError: every layer learns.
        """
        self._backbone, self._layers = parts.backbone, parts.layers
        learning = [i for i, layer in enumerate(self._backbone[self._layers]) if tree_flatten(layer.trainable_parameters())]
        self._below = learning[0]
        if not self._below:
            raise UserError("cache_trunk: every layer learns, so nothing can be kept", hint="set num_layers, or leave it out")
        self._data, self._index, self._key = folder / "states.bin", folder / "index.jsonl", folder / "key.json"
        self._what = json.loads(json.dumps(key | {"layers": self._below, "format": FORMAT}))
        # Of a row: its first token in the file, how many it has, and the digest of an earlier run that was not compared yet.
        self._places: dict[str, tuple[int, int, str]] | None = None
        self._width, self._dtype = 0, mx.float32
        self._torn = False  # the last line of the index was cut off

    def states(self, model: Any, inputs: mx.array, layouts: Any, rows: tuple[Placed, ...]) -> mx.array:
        """[B, T, D] for `inputs` [B, T]: from the file where all of its rows are there, else computed and written."""
        places = self._places = self._opened() if self._places is None else self._places
        names = [_name(row.inputs) for row in rows]
        if not all([name in places and self._sound(places, name) for name in names]):  # each of them is looked at
            states = self._compute(model, inputs, layouts)
            flat = states.reshape(-1, states.shape[-1])
            for name, row in zip(names, rows, strict=True):
                if name not in places:
                    places[name] = self._write(name, flat[mx.array(row.where)])
            return states
        found = np.zeros((inputs.size, self._width), STORED[self._dtype])
        for name, row in zip(names, rows, strict=True):
            found[row.where] = self._read(*places[name][:2])
        states = mx.array(found)
        return (states.view(mx.bfloat16) if self._dtype == mx.bfloat16 else states).reshape(*inputs.shape, self._width)

    def _read(self, first: int, count: int) -> np.ndarray:
        kind = STORED[self._dtype]
        return np.memmap(self._data, kind, "r", first * self._width * kind.itemsize, (count, self._width))

    def _sound(self, places: dict[str, tuple[int, int, str]], name: str) -> bool:
        """Whether the file holds what was written; else it is taken out of `places`. Compared once a run."""
        first, count, digest = places[name]
        if digest and _digest(self._read(first, count)) != digest:
            del places[name]
            return False
        places[name] = first, count, ""
        return True

    @contextmanager
    def given(self, states: mx.array) -> Iterator[None]:
        """Inside, the layers below are not computed: `states` is what comes out of them."""
        layers = self._backbone[self._layers]
        self._backbone[self._layers] = [*(_Instead(one, lambda _: states) for one in layers[: self._below]), *layers[self._below :]]
        try:
            yield
        finally:
            self._backbone[self._layers] = layers

    def _compute(self, model: Any, inputs: mx.array, layouts: Any) -> mx.array:
        layers, met = self._backbone[self._layers], list[mx.array]()

        def keep(hidden: mx.array) -> mx.array:
            met.append(hidden)
            return hidden

        self._backbone[self._layers] = [*layers[: self._below], *(_Instead(one, keep) for one in layers[self._below :])]
        try:
            model(inputs, cache=layouts)
        finally:
            self._backbone[self._layers] = layers
        mx.eval(met[0])
        self._dtype, self._width = met[0].dtype, met[0].shape[-1]
        return met[0]

    def _write(self, name: str, states: mx.array) -> tuple[int, int, str]:
        array = np.array(states.view(mx.uint16) if self._dtype == mx.bfloat16 else states)
        first = self._data.stat().st_size // (self._width * array.itemsize) if self._data.exists() else 0
        try:
            with self._data.open("r+b" if self._data.exists() else "w+b") as file:
                file.seek(first * self._width * array.itemsize)
                file.write(array.tobytes())
            with self._index.open("a", encoding="utf-8") as lines:
                lines.write("\n" * self._torn + json.dumps([name, first, *array.shape, KINDS[self._dtype], _digest(array)]) + "\n")
        except OSError as error:
            hint = "make room, or leave cache_trunk out; the last checkpoint is kept: --resume goes on"
            raise UserError(f"{self._data}: {error.strerror}", hint=hint) from error
        self._torn = False
        return first, len(array), ""

    def _opened(self) -> dict[str, tuple[int, int, str]]:
        if self._key.exists() and read_json(self._key) == self._what:
            return self._known()
        self._data.parent.mkdir(parents=True, exist_ok=True)
        for path in (self._index, self._data):
            path.unlink(missing_ok=True)
        write_json(self._key, self._what)
        return {}

    def _known(self) -> dict[str, tuple[int, int, str]]:
        """What an earlier run left that is not cut off."""
        places: dict[str, tuple[int, int, str]] = {}
        size = self._data.stat().st_size if self._data.exists() else 0
        index = self._index.read_text(encoding="utf-8", errors="replace") if self._index.exists() else ""
        self._torn = bool(index) and not index.endswith("\n")
        for line in index.splitlines():
            try:
                name, first, count, width, kind, digest = json.loads(line)
                dtype = next(dtype for dtype, named in KINDS.items() if named == kind)
                whole = (first + count) * width * STORED[dtype].itemsize <= size
            except (ValueError, TypeError, StopIteration):
                continue  # a crash fell into it
            if whole:
                places[name], self._width, self._dtype = (first, count, digest), width, dtype
        return places


class _Instead:
    """Stands in for a layer, of which the model may ask what kind it is."""

    def __init__(self, layer: nn.Module, call: Callable[[mx.array], mx.array]) -> None:
        self._layer, self._call = layer, call

    def __call__(self, hidden: mx.array, *arguments: Any, **named: Any) -> mx.array:
        return self._call(hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _digest(states: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(states).data, digest_size=16).hexdigest()


def _name(inputs: np.ndarray) -> str:
    return hashlib.blake2b(inputs.astype("<i4").tobytes(), digest_size=16).hexdigest()
