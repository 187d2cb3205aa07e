"""Torch checkpoints (pytorch_model.bin, or shards and an index) written as safetensors, without torch and without running a pickle.

Since torch 1.6 such a file is a zip archive of stored records: `data.pkl`, which names the tensors, and `data/<key>`, their
numbers (https://docs.pytorch.org/docs/stable/notes/serialization.html). Numbers are read by offset, a block at a time.
"""

import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.models.shards import Planned, ShardWriter
from mlx_finetune.models.torch_legacy import BLOCK, blocks, legacy_tensors
from mlx_finetune.models.torch_pickle import DAMAGED, LONGEST, Tensor, read_tensors, shown
from mlx_finetune.models.weights import INDEX, tensor_index

Progress = Callable[[int, int], None]

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
MOST_COPIES = 4  # of the numbers of a file: tensors that share a storage are written one by one
ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickle of a number that torch < 1.6 begins its files with
POINTER = b"version https://"  # what git-lfs leaves in place of a large file
LOCAL_HEADER = 30  # bytes before the name of a record; the last four say how long name and extra field are


@dataclass(frozen=True)
class _Checkpoint:
    """One file: its tensors by name, and how the numbers of one are read, as they are to be written."""

    file: Path
    tensors: Mapping[str, Tensor]
    read: Callable[[Tensor], Iterator[bytes]]


def bin_files(folder: Path) -> tuple[Path, ...]:
    """The torch files that make up the model of a folder: those of the index, else pytorch_model.bin; none where there is neither.

    Raises:
        UserError: the index is broken, names what is no file of this folder, or a file that is not there.
    """
    names = sorted(set(tensor_index(folder / BIN_INDEX, ".bin", DAMAGED).values()))
    if not names:
        return (folder / BIN,) if (folder / BIN).is_file() else ()
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / BIN_INDEX}: names {name}, which is not there", hint="download the missing file")
    if BIN not in names and (folder / BIN).is_file():
        raise UserError(f"{folder}: {BIN} and an index of other files: which is the model?", hint="move one of them away")
    return tuple(folder / name for name in names)


def bin_to_safetensors(folder: Path, out: Path, progress: Progress | None = None) -> None:
    """Writes the weights of the torch checkpoint in `folder` to the folder `out` as safetensors, every number as it is.

    One file for each of its files: model.safetensors, or model-0000x-of-0000y.safetensors and an index. Tensors that share
    numbers get copies of their own. `progress(done, total)` counts bytes written. Memory: a few blocks of 8 MiB; a file that
    torch before 1.6 wrote is loaded whole, by torch.

    Raises:
        UserError: no torch checkpoint; a file that is broken, cut, or asks for anything but tensors; one of the index that is
            missing; no room. What was written is then deleted.
    """
    files = bin_files(folder)
    if not files:
        raise UserError(f"{folder}: neither {BIN} nor {BIN_INDEX}", hint="name the folder of a model with torch weights")
    checkpoints = [_open(file) for file in files]
    _check_names(folder, checkpoints)
    # wide numbers first, so that all are aligned
    orders = [dict(sorted(each.tensors.items(), key=lambda item: -item[1].storage.item)) for each in checkpoints]
    plans = [{name: Planned(tensor.storage.dtype, tensor.shape) for name, tensor in order.items()} for order in orders]
    total = sum(tensor.bytes for checkpoint in checkpoints for tensor in checkpoint.tensors.values())
    done = 0

    def counted(blocks: Iterable[bytes]) -> Iterator[bytes]:
        nonlocal done
        for block in blocks:
            yield block
            done += len(block)
            if progress is not None:
                progress(done, total)

    writer = ShardWriter(out, plans, {"format": "pt"})
    targets = [out / name for name in (*writer.names, *([INDEX] if len(files) > 1 else []))]
    with _all_or_nothing(targets), writer:
        for checkpoint, order in zip(checkpoints, orders, strict=True):
            for name, tensor in order.items():
                writer.write(name, counted(checkpoint.read(tensor)))


def _check_names(folder: Path, checkpoints: list[_Checkpoint]) -> None:
    """Each tensor once, and those of the index where it says."""
    where: dict[str, str] = {}
    for checkpoint in checkpoints:
        for name in checkpoint.tensors:
            if name in where:
                raise UserError(
                    f"{folder}: tensor {shown(name)} is both in {where[name]} and in {checkpoint.file.name}", hint=DAMAGED
                )
            if name == "__metadata__":
                raise UserError(f"{checkpoint.file}: a tensor is called {name}, as none may in safetensors", hint=DAMAGED)
            where[name] = checkpoint.file.name
    for name, file in tensor_index(folder / BIN_INDEX, ".bin", DAMAGED).items():
        if where.get(name) != file:
            raise UserError(f"{folder / BIN_INDEX}: tensor {shown(name)} is not in {file}", hint=DAMAGED)


@contextmanager
def _all_or_nothing(targets: list[Path]) -> Iterator[None]:
    """Deletes `targets`, which were not there before, where the block ends with an error."""
    for target in targets:
        if target.exists() or target.is_symlink():
            raise UserError(f"{target} exists already", hint="choose an empty folder")
    done = False
    try:
        yield
        done = True
    except OSError as error:
        raise UserError(f"{targets[0].parent}: cannot be written: {error.strerror}", hint="choose another place") from error
    finally:
        for target in targets if not done else []:
            target.unlink(missing_ok=True)


def _open(file: Path) -> _Checkpoint:
    try:
        with file.open("rb") as opened:
            start = opened.read(len(POINTER))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}", hint=DAMAGED) from error
    if start.startswith(ZIP):
        return _open_zip(file)
    if start.startswith(LEGACY):
        return _Checkpoint(file, *legacy_tensors(file))
    if start == POINTER:
        raise UserError(f"{file}: a pointer of git-lfs, not the file itself", hint="git lfs pull, or download it")
    raise UserError(f"{file}: not a torch checkpoint", hint=DAMAGED)


def _open_zip(file: Path) -> _Checkpoint:
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as opened:
            records, pickled = _records(file, archive, opened)
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, ValueError, struct.error) as error:
        raise UserError(f"{file}: the archive is broken or cut: {' '.join(str(error).split())[:100]}", hint=DAMAGED) from error
    tensors = read_tensors(pickled, str(file))
    for name, tensor in tensors.items():
        start, end = records.get(tensor.storage.key, (0, -1))
        if end - start < tensor.storage.numbers * tensor.storage.item:
            what = "is not there" if end < 0 else f"has {end - start} bytes"
            raise UserError(f"{file}: numbers of {shown(name)}: record data/{shown(tensor.storage.key)} {what}", hint=DAMAGED)
    held = sum(end - start for start, end in records.values())
    if sum(tensor.bytes for tensor in tensors.values()) > MOST_COPIES * held:
        raise UserError(f"{file}: its tensors are many views of the same numbers", hint="that is no checkpoint of weights")

    def read(tensor: Tensor) -> Iterator[bytes]:
        start = records[tensor.storage.key][0] + tensor.offset * tensor.storage.item
        return _in_order(file, start, tensor.bytes) if tensor.in_order else _gathered(file, records, tensor)

    return _Checkpoint(file, tensors, read)


def _records(file: Path, archive: zipfile.ZipFile, opened: IO[bytes]) -> tuple[dict[str, tuple[int, int]], bytes]:
    """Where the bytes of each record `data/<key>` begin and end in the file, and the pickle."""
    size, entries = file.stat().st_size, archive.infolist()
    by_name = {entry.filename: entry for entry in entries}
    if len(by_name) < len(entries):
        raise ValueError("two records of the same name")
    pickles = [name for name in by_name if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise ValueError(f"{len(pickles)} records data.pkl, not one")
    root = pickles[0].removesuffix("data.pkl")
    places = {}
    for name, entry in by_name.items():
        if name.startswith(f"{root}data/") or name in (pickles[0], f"{root}byteorder"):
            places[name.removeprefix(root)] = _place(entry, opened, size)
    order = places.pop("byteorder", None)
    if order and _bytes(opened, order)[:16] != b"little":
        raise ValueError("its numbers are not in little-endian order")
    if (length := places["data.pkl"][1] - places["data.pkl"][0]) > LONGEST:
        raise ValueError(f"a pickle of {length} bytes")
    pickled = _bytes(opened, places.pop("data.pkl"))
    return {name.removeprefix("data/"): place for name, place in places.items()}, pickled


def _place(entry: zipfile.ZipInfo, opened: IO[bytes], size: int) -> tuple[int, int]:
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise ValueError(f"{shown(entry.filename)} is compressed or encrypted, as torch never does")
    opened.seek(entry.header_offset)
    header = opened.read(LOCAL_HEADER)
    if len(header) < LOCAL_HEADER or not header.startswith(ZIP):
        raise ValueError(f"{shown(entry.filename)} is not where the archive says")
    start = entry.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", header[-4:]))
    if start + entry.file_size > size:
        raise ValueError(f"{shown(entry.filename)} ends behind the end of the file")
    return start, start + entry.file_size


def _bytes(opened: IO[bytes], place: tuple[int, int]) -> bytes:
    opened.seek(place[0])
    return opened.read(min(place[1] - place[0], LONGEST))


def _in_order(file: Path, start: int, count: int) -> Iterator[bytes]:
    with file.open("rb") as opened:
        opened.seek(start)
        while count:
            block = opened.read(min(BLOCK, count))
            if not block:
                raise UserError(f"{file}: cut while it was read", hint=DAMAGED)
            yield block
            count -= len(block)


def _gathered(file: Path, records: Mapping[str, tuple[int, int]], tensor: Tensor) -> Iterator[bytes]:
    """Row-major, of numbers that lie in another order."""
    storage = tensor.storage
    kind = f"<u{storage.item}"  # bits, whatever they mean
    stored = np.memmap(file, kind, "r", records[storage.key][0], (storage.numbers,))
    strides = [stride * storage.item for stride in tensor.strides]
    return blocks(np.lib.stride_tricks.as_strided(stored[tensor.offset :], tensor.shape, strides, writeable=False))
