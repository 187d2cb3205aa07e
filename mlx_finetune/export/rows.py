"""What becomes of a tensor of the original checkpoint, a few rows at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_finetune.engines.adapter import HEAD
from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.models.mlx_config import is_tied
from mlx_finetune.models.weights import ITEM_BYTES, TensorLocation, read_float32, tensor_headers

# (number of the first row, stored rows [n, columns] float32) -> what they become, float32
Rows = Callable[[int, np.ndarray], np.ndarray]
Headers = dict[str, TensorLocation]

HEAD_WEIGHT = f"{HEAD}.weight"
EMBEDDINGS = (".embed_tokens.weight", ".wte.weight")
BASE = "give the model it was trained on"
ORIGINAL = "fuse into the original, unquantised model"
DIVERGED = "the training diverged: take an earlier checkpoint"


@dataclass(frozen=True)
class Change:
    """A tensor of the original checkpoint; `open_rows` reads what its change takes."""

    location: TensorLocation
    open_rows: Callable[[], Rows]


def factored(left: np.ndarray, right: np.ndarray, magnitude: np.ndarray | None) -> Rows:
    """W + `left` @ `right`; with `magnitude` each row of it made so long. [rows, r], [r, columns], [rows]."""

    def rows(first: int, before: np.ndarray) -> np.ndarray:
        here = slice(first, first + len(before))
        after: np.ndarray = left[here] @ right
        after += before
        if magnitude is None:
            return after
        with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite is refused where it is written
            after *= (magnitude[here] / np.linalg.norm(after, axis=1))[:, None]
        return after

    return rows


def original(model: Path) -> tuple[Headers, bool]:
    """The tensors of the model, and whether its head is its embeddings."""
    config = read_json(model / "config.json")
    how = config.get("quantization") or config.get("quantization_config") if isinstance(config, dict) else "unknown"
    # mxfp4 is of experts alone; whoever changes one of those is refused by its dtype
    if how and not (isinstance(how, dict) and how.get("quant_method") == "mxfp4"):
        raise UserError(f"{model}: quantised weights cannot be changed", hint=ORIGINAL)
    headers = tensor_headers(model)
    has_head = any(name.endswith(HEAD_WEIGHT) for name in headers)
    return headers, is_tied(config) or not has_head


def fitting(model: Path, headers: Headers, name: str, shape: tuple[int, ...], by: str) -> TensorLocation:
    """Where the tensor lies; `by`: who changes it.

    Raises:
        UserError: the model has none of that name and shape, or stores it in a form that cannot be added to.
    """
    location = headers.get(name)
    if location is None:
        raise UserError(f"{by} {list(shape)}, {model} has no tensor {name}", hint=BASE)
    if location.shape != shape:
        raise UserError(f"{by} {list(shape)}, {model} has {list(location.shape)}", hint=BASE)
    if location.dtype not in ITEM_BYTES:
        what = f"is stored as {location.dtype}, not as one of {', '.join(ITEM_BYTES)}"
        raise UserError(f"{model}: {name} {what}", hint=ORIGINAL)
    return location


def tied_twins(headers: Headers, is_tied: bool) -> tuple[str, str] | None:
    """Embeddings and head of a model where the weight that they share is stored twice."""
    head = next((name for name in headers if is_tied and f".{name}".endswith(f".{HEAD_WEIGHT}")), None)
    embeddings = next((name for name in headers if name != head and f".{name}".endswith(EMBEDDINGS)), None)
    return (embeddings, head) if embeddings and head else None


def with_twin(changes: Mapping[str, Change], headers: Headers, is_tied: bool) -> dict[str, Change]:
    """`changes`, and that of the embeddings for the head too where the weight that they share is stored twice.

    Raises:
        UserError: the two are not stored alike.
    """
    embeddings, head = tied_twins(headers, is_tied) or ("", "")
    if embeddings not in changes:
        return dict(changes)
    location, other = headers[head], headers[embeddings]
    if (location.shape, location.dtype) != (other.shape, other.dtype):
        raise UserError(f"{location.file}: {head} is not stored as {embeddings}, which it is tied to", hint=BASE)
    return {**changes, head: Change(location, changes[embeddings].open_rows)}


def rows_at(location: TensorLocation, first: int, count: int) -> TensorLocation:
    """Where `count` rows, by the first axis, of a stored tensor lie."""
    size = (location.end - location.start) // max(1, location.shape[0])
    start = location.start + first * size
    return replace(location, shape=(count, *location.shape[1:]), start=start, end=start + count * size)


def trained_rows(parameter: str, location: TensorLocation) -> Rows:
    """The trained numbers themselves, whatever stood there."""

    def rows(first: int, before: np.ndarray) -> np.ndarray:
        here = rows_at(location, first, len(before)) if location.shape else location
        return finite(here, parameter).reshape(before.shape)

    return rows


def finite(location: TensorLocation, parameter: str) -> np.ndarray:
    """The tensor in float32; raises UserError where a number of it is not finite: a training that diverged."""
    array = read_float32(location)
    if not np.isfinite(array).all():
        raise UserError(f"{location.file}: {parameter} has numbers that are not finite", hint=DIVERGED)
    return array
