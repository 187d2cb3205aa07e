"""Where each tensor of a Hugging Face folder lies, and its numbers as float32: safetensors read by header and offset.

Nothing here loads a model, so a checkpoint of any size is read in a few megabytes, and a broken or cut file is found
before anything is allocated. The format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeGuard

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.files import DAMAGED, read_json
from mlx_finetune.reading import is_file_name, open_ordinary

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100_000_000  # the safetensors library's own
SAMPLE = 256  # bytes read at the start and in the middle of each tensor for a fingerprint
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
BITS |= {"F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
BITS |= {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
TWO, FOUR = np.dtype("<u2"), np.dtype("<u4")
EXPONENTS: dict[str, tuple[Any, int]] = {"F32": (FOUR, 0x7F800000), "F16": (TWO, 0x7C00), "BF16": (TWO, 0x7F80)}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # what `to_float32` and `from_float32` know
REDOWNLOAD = "the file is broken or was cut while copying: download it again"


@dataclass(frozen=True)
class TensorLocation:
    """One tensor: bytes `start` to `end` (counted from the beginning of the file), row-major, little-endian."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def tensor_headers(folder: Path) -> dict[str, TensorLocation]:
    """Every tensor of a model folder by name, in the order of the files.

    Raises:
        UserError: no safetensors; a broken or cut file; an index that names a file or a tensor that is not there.
    """
    index = tensor_index(folder / INDEX, ".safetensors", REDOWNLOAD)
    tensors: dict[str, TensorLocation] = {}
    for file in weight_files(folder):
        for name, location in file_headers(file).items():
            if name in tensors:
                raise UserError(f"{folder}: tensor {name} is both in {tensors[name].file.name} and in {file.name}", hint=REDOWNLOAD)
            tensors[name] = location
    for name, file_name in index.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise UserError(f"{folder / INDEX}: tensor {name} is not in {file_name}", hint=REDOWNLOAD)
    return tensors


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors that make up the model: those of the index, else model.safetensors, else all that are present.

    Raises:
        UserError: there is none, one of the index is missing, or an index and another whole model stand side by side.
    """
    names = sorted(set(tensor_index(folder / INDEX, ".safetensors", REDOWNLOAD).values()))
    if names:
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder / INDEX}: names {missing[0]}, which is not there", hint="download the missing file")
        # transformers would read model.safetensors and mlx-lm both of them
        if SINGLE not in names and (folder / SINGLE).is_file():
            raise UserError(f"{folder}: {SINGLE} and an index of other files: which is the model?", hint="move one of them away")
        return tuple(folder / name for name in names)
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    found = tuple(sorted(path for path in folder.glob("*.safetensors") if path.is_file() and not path.name.startswith(".")))
    if not found:
        is_bin = any(folder.glob("pytorch_model*.bin"))
        hint = (
            f"mlx-finetune convert {folder} --out DIR" if is_bin else "use a Hugging Face model folder with weights in safetensors"
        )
        raise UserError(f"{folder}: no *.safetensors{', only pytorch_model.bin' if is_bin else ''}", hint)
    return found


def file_headers(file: Path) -> dict[str, TensorLocation]:
    """The tensors of one safetensors file; offsets must fill the file exactly, as the safetensors library asks.

    Raises:
        UserError: no such file, not safetensors, broken, or cut.
    """
    try:
        size = file.stat().st_size
        with open_ordinary(file) as opened:
            header, data_start = _read_header(opened, size, file)
    except FileNotFoundError as error:
        is_bin = file.with_suffix(".bin").is_file()
        hint = f"{file.with_suffix('.bin').name} is not read: save it as safetensors" if is_bin else DAMAGED
        raise UserError(f"{file}: no such file", hint) from error
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}", hint=DAMAGED) from error
    header.pop("__metadata__", None)
    tensors = {name: _location(file, name, entry, data_start, size) for name, entry in header.items()}
    position = data_start
    for name, location in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if location.start != position:
            raise UserError(f"{file}: tensor {name} starts at byte {location.start}, not at {position}", hint=REDOWNLOAD)
        position = location.end
    if position != size:
        raise UserError(f"{file}: {size} bytes, the header promises {position}", hint=REDOWNLOAD)
    return tensors


def fingerprint(folder: Path) -> str:
    """16 hexadecimal digits that tell one model from another, wherever it is stored and however it is cut into files.

    Reads config.json and, of every tensor, name, dtype, shape and 2 x 256 bytes: a fraction of a second for 16 GB.

    Raises:
        UserError: as `tensor_headers`, or there is no config.json.
    """
    tensors = tensor_headers(folder)
    digest = hashlib.sha256(json.dumps(read_json(folder / "config.json"), sort_keys=True).encode())
    opened: dict[Path, IO[bytes]] = {}
    try:
        for name, location in sorted(tensors.items()):
            digest.update(f"\n{name} {location.dtype} {location.shape}\n".encode())
            file = opened.get(location.file) or opened.setdefault(location.file, location.file.open("rb"))
            for offset in (location.start, (location.start + location.end) // 2):
                file.seek(offset)
                digest.update(file.read(min(SAMPLE, location.end - offset)))
    finally:
        for file in opened.values():
            file.close()
    return digest.hexdigest()[:16]


def read_float32(location: TensorLocation) -> np.ndarray:
    """The whole tensor, widened exactly to float32; F32, F16 and BF16 only."""
    with location.file.open("rb") as file:
        file.seek(location.start)
        data = file.read(location.end - location.start)
    return to_float32(data, location.dtype).reshape(location.shape)


def read_rows(location: TensorLocation, rows: Sequence[int]) -> np.ndarray:
    """Some rows of a matrix, widened exactly to float32 [n, columns]; F32, F16 and BF16 only."""
    size = location.shape[1] * ITEM_BYTES[location.dtype]
    found = []
    with location.file.open("rb") as file:
        for row in rows:
            file.seek(location.start + row * size)
            found.append(to_float32(file.read(size), location.dtype))
    return np.stack(found)


def to_float32(data: bytes, dtype: str) -> np.ndarray:
    """Stored bytes of F32, F16 or BF16 as float32 [n]; exact."""
    if dtype == "BF16":
        widened: np.ndarray = np.left_shift(np.frombuffer(data, "<u2"), 16, dtype="<u4").view("<f4")
        return widened
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def from_float32(values: np.ndarray, dtype: str) -> bytes:
    """float32 as F32, F16 or BF16 in row-major order, rounded to nearest, ties to even; too large becomes infinite."""
    stored = stored_numbers(values, dtype)
    if dtype == "BF16" and not are_finite(stored, dtype):
        stored[np.isnan(values)] = 0x7FC0
    return stored.tobytes()


def stored_numbers(values: np.ndarray, dtype: str) -> np.ndarray:
    """As `from_float32`, an array of what is stored; one of computed numbers, of which a NaN stays one that is not finite."""
    if dtype == "BF16":
        return _rounded(values)
    with np.errstate(over="ignore"):
        return values.astype({"F32": "<f4", "F16": "<f2"}[dtype])


def _rounded(values: np.ndarray) -> np.ndarray:
    """numpy has no bfloat16: it is the upper half of a float32, so the lower half is rounded into it. uint16."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    return rounded.astype("<u2")


def are_finite(stored: np.ndarray, dtype: str) -> bool:
    """Whether all of the stored numbers of F32, F16 or BF16 are; the exponent of the others is all ones."""
    kind, ones = EXPONENTS[dtype]
    return bool((stored.view(kind) & kind.type(ones) != ones).all())


def tensor_index(path: Path, ending: str, hint: str) -> Mapping[str, str]:
    """Tensor name to the name of its shard, empty where there is no index.

    Raises:
        UserError: with `hint`; it is no index, or a name is not that of a file of its folder with this ending.
    """
    if not path.is_file():
        return {}
    index = read_json(path)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f'{path}: no "weight_map"', hint=hint)
    for name in names.values():
        if not is_file_name(name, ending):
            raise UserError(f"{path}: {name!r:.80} is not the name of a {ending} file of this folder", hint=hint)
    return names


def _read_header(opened: IO[bytes], size: int, file: Path) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(opened.read(8), "little")
    if size < 8 or length > min(size - 8, HEADER_LIMIT):
        raise UserError(f"{file}: not safetensors, or cut: no whole header in {size} bytes", hint=REDOWNLOAD)
    try:
        header = json.loads(opened.read(length))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: the header is not JSON", hint=REDOWNLOAD) from error
    if not isinstance(header, dict):
        raise UserError(f"{file}: the header is not a JSON object", hint=REDOWNLOAD)
    return header, 8 + length


def _location(file: Path, name: str, entry: Any, data_start: int, size: int) -> TensorLocation:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise UserError(f"{file}: tensor {name} has the unknown dtype {dtype!r}", hint=REDOWNLOAD)
    if not (_counts(shape) and _counts(offsets) and len(offsets) == 2):
        raise UserError(f"{file}: tensor {name} has no shape and offsets", hint=REDOWNLOAD)
    start, end = data_start + offsets[0], data_start + offsets[1]
    if start > end or (end - start) * 8 != math.prod(shape) * BITS[dtype]:
        raise UserError(f"{file}: tensor {name} {dtype} {shape} cannot fill bytes {start} to {end}", hint=REDOWNLOAD)
    if end > size:
        raise UserError(f"{file}: cut at byte {size}: tensor {name} ends at {end}", hint=REDOWNLOAD)
    return TensorLocation(file, dtype, tuple(shape), start, end)


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
