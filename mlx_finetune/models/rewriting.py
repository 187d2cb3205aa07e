"""A Hugging Face folder's weights written again: the same tensors in the same shards, in another dtype where that is asked for."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.files import copy_file
from mlx_finetune.models.shards import Planned, ShardWriter, check_room, shard_name, write_index
from mlx_finetune.models.weights import ITEM_BYTES, TensorLocation, from_float32, tensor_headers, to_float32, weight_files

Progress = Callable[[int, int], None]

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
BLOCK = 1 << 22  # numbers held at once


def rewrite(model: Path, folder: Path, dtype: str | None, progress: Progress) -> int:
    """Writes the weights of `model` into `folder` and gives back their bytes. `dtype`: a key of DTYPES, rounded to once.

    Files keep their tensors and order; what has the dtype already, and what is no float, stays as it is, byte for byte.

    Raises:
        UserError: a broken file, or a number that float16 cannot hold.
    """
    files, tensors = weight_files(model), tensor_headers(model)
    if dtype is None:
        return _copy(files, tensors, folder, progress)
    shards = [{n: t for n, t in tensors.items() if t.file == file} for file in files]
    planned = [{n: Planned(_dtype(t, dtype), t.shape) for n, t in shard.items()} for shard in shards]
    total, done = sum(tensor.bytes for shard in planned for tensor in shard.values()), 0
    with ShardWriter(folder, planned, {"format": "pt"}) as writer:
        for shard, plans in zip(shards, planned, strict=True):
            for name, location in shard.items():
                writer.write(name, _cast(name, location, plans[name].dtype))
                done += plans[name].bytes
                progress(done, total)
    return total


def _copy(files: tuple[Path, ...], tensors: dict[str, TensorLocation], folder: Path, progress: Progress) -> int:
    names = {file: shard_name(i, len(files)) for i, file in enumerate(files)}
    size, done = sum(file.stat().st_size for file in files), 0
    check_room(folder, size)
    for file, name in names.items():
        copy_file(file, folder / name)
        done += file.stat().st_size
        progress(done, size)
    numbers = sum(location.end - location.start for location in tensors.values())
    if len(files) > 1:
        write_index(folder, {name: names[location.file] for name, location in tensors.items()}, numbers)
    return numbers


def _dtype(location: TensorLocation, dtype: str) -> str:
    return DTYPES[dtype] if location.dtype in ITEM_BYTES else location.dtype


def _cast(name: str, location: TensorLocation, dtype: str) -> Iterator[bytes]:
    """Blocks of the tensor's numbers in `dtype`."""
    count, size = math.prod(location.shape), ITEM_BYTES.get(location.dtype, 1)
    rest = location.end - location.start
    assert location.dtype not in ITEM_BYTES or rest == count * size
    with location.file.open("rb") as file:
        file.seek(location.start)
        while rest:
            data = file.read(min(rest, BLOCK * size))
            if not data:
                raise UserError(f"{location.file}: cut while it was read", hint="download it again")
            rest -= len(data)
            yield data if location.dtype == dtype else _rounded(name, to_float32(data, location.dtype), dtype)


def _rounded(name: str, values: np.ndarray, dtype: str) -> bytes:
    data = from_float32(values, dtype)
    if not np.array_equal(np.isfinite(to_float32(data, dtype)), np.isfinite(values)):
        raise UserError(f"{name}: {np.abs(values).max():g} is more than {dtype} holds", hint="--dtype bfloat16")
    return data
