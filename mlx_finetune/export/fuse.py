"""The adapter added to the original Hugging Face weights: the folder is copied, and only the adapted tensors change.

The model is never loaded. Each adapted tensor is read in blocks of rows, W + scale * B @ A is computed in float32,
rounded once to the stored dtype, and written over the copy's bytes; every other byte is the original's.
"""

import ctypes
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_folder, read_json, write_json
from mlx_finetune.models.weights import (
    ITEM_BYTES,
    TensorLocation,
    file_headers,
    from_float32,
    read_float32,
    tensor_headers,
    to_float32,
    weight_files,
)

Progress = Callable[[int, int], None]

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
# Modules whose weight may be shared with another: the two would part on fusing.
TIED = ("lm_head", "embed_tokens", "embed_in", "embed_out", "wte")
# Settings of peft that are read here, and those that change nothing in what the saved A and B mean; others must be off.
READ = {"peft_type", "task_type", "r", "lora_alpha", "target_modules", "use_rslora", "init_lora_weights", "bias"}
IDLE = {"base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform"}
IDLE |= {"auto_mapping", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision"}
IDLE |= {"fine_tune_type", "lora_parameters", "num_layers"}  # mlx-lm's, which peft passes over
# Other copies of the weights, which would be stale beside the fused ones.
OTHER_WEIGHTS = (".safetensors", ".bin", ".bin.index.json", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx")
BLOCK = 1 << 21  # numbers computed at once: 8 MiB of float32


@dataclass(frozen=True)
class Adapter:
    """LoRA pairs by module: A [r, in] and B [out, r], not read yet; the weight's change is scale * B @ A [out, in]."""

    scale: float
    pairs: dict[str, tuple[TensorLocation, TensorLocation]]


@dataclass(frozen=True)
class Fused:
    """What was written: how many tensors changed, the dtypes they are stored in, and the bytes of the whole folder."""

    tensors: int
    dtypes: tuple[str, ...]
    bytes: int


def fuse(model: Path, checkpoint: Path, out: Path, progress: Progress | None = None) -> Fused:
    """Writes the Hugging Face folder `out`: `model` with the adapter of `checkpoint` (PEFT layout) in its weights.

    `progress(done, total)` counts bytes written. Memory: a few blocks of 8 MiB and one A and B.

    Raises:
        UserError: `out` exists; a broken file; an adapter that does not fit the model, or that cannot be added yet.
    """
    with atomic_folder(out) as folder:
        return fuse_into(model, checkpoint, folder, progress)


def fuse_into(model: Path, checkpoint: Path, folder: Path, progress: Progress | None = None) -> Fused:
    """As `fuse`, into an empty folder that the caller makes and gives its name to."""
    adapter = read_adapter(checkpoint)
    targets = base_weights(model, adapter)
    files = list(_files_to_copy(model))
    copied = sum(source.stat().st_size for source in files)
    total = copied + sum(location.end - location.start for location in targets.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for source in files:
        _copy(source, folder / source.relative_to(model))
        advance(source.stat().st_size)
    changed = 0
    for module, location in targets.items():
        changed += _patch(folder / location.file.name, location, adapter, module)
        advance(location.end - location.start)
    if changed == 0:
        dtypes = ", ".join(sorted({location.dtype for location in targets.values()}))
        raise UserError(f"{checkpoint}: the adapter changes no weight at the precision of {dtypes}", hint="train longer")
    return Fused(len(targets), tuple(sorted({location.dtype for location in targets.values()})), copied)


def write_template(folder: Path, template: str) -> None:
    """Makes `template` the chat template of a model folder, where it is not that already: any server serves what was trained."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    settings = read_json(config) if config.is_file() else {}
    own = file.read_bytes().decode() if file.is_file() else settings.get("chat_template") if isinstance(settings, dict) else None
    if own == template:
        return
    file.write_bytes(template.encode())
    if isinstance(settings, dict) and settings.pop("chat_template", None) is not None:
        write_json(config, settings)


def read_adapter(checkpoint: Path) -> Adapter:
    """Reads settings and headers of a PEFT LoRA checkpoint, and checks that A and B pair up.

    Raises:
        UserError: a missing or broken file, an adapter that is neither LoRA nor rsLoRA, an unpaired tensor.
    """
    rank, scale = _rank_and_scale(checkpoint / CONFIG)
    path = checkpoint / TENSORS
    sides: dict[str, dict[str, TensorLocation]] = {LORA_A: {}, LORA_B: {}}
    for name, location in file_headers(path).items():
        side = next((side for side in sides if name.endswith(side)), None)
        if side is None or not name.startswith(PREFIX):
            raise UserError(f"{path}: tensor {name} is no LoRA matrix of a linear layer", hint="only plain LoRA can be fused")
        sides[side][name.removeprefix(PREFIX).removesuffix(side)] = location
    unpaired = sorted(sides[LORA_A].keys() ^ sides[LORA_B].keys())
    if unpaired or not sides[LORA_A]:
        what = f"{unpaired[0]} has only one of lora_A and lora_B" if unpaired else "no LoRA tensors"
        raise UserError(f"{path}: {what}", hint="use a checkpoint folder of a finished save")
    pairs = {module: (a, sides[LORA_B][module]) for module, a in sides[LORA_A].items()}
    for module, (a, b) in pairs.items():
        if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
            raise UserError(f"{path}: {module}: A {list(a.shape)} and B {list(b.shape)} are not [{rank}, in] and [out, {rank}]")
        for location in (a, b):
            if location.dtype not in ITEM_BYTES:
                raise UserError(f"{path}: {module}: dtype {location.dtype} is not one of {', '.join(ITEM_BYTES)}")
    return Adapter(scale, pairs)


def base_weights(model: Path, adapter: Adapter) -> dict[str, TensorLocation]:
    """The tensor of the original checkpoint that each adapted module changes, in the order of the files.

    Raises:
        UserError: a module without such a tensor, of another shape, quantised, or possibly tied to another.
    """
    config = read_json(model / "config.json")
    if not isinstance(config, dict) or "quantization_config" in config or "quantization" in config:
        raise UserError(f"{model}: quantised weights cannot take an adapter", hint="fuse into the original, unquantised model")
    headers = tensor_headers(model)
    found: dict[str, TensorLocation] = {}
    for module, (a, b) in adapter.pairs.items():
        location = headers.get(f"{module}.weight")
        if module.rpartition(".")[2] in TIED:
            raise UserError(f"adapter on {module}: its weight may be tied to another; fusing would part them", hint="leave it out")
        if location is None:
            raise UserError(f"adapter on {module}: {model} has no tensor {module}.weight", hint="give the model it was trained on")
        if location.shape != (b.shape[0], a.shape[1]):
            shapes = f"the adapter changes {[b.shape[0], a.shape[1]]}, {model} has {list(location.shape)}"
            raise UserError(f"adapter on {module}: {shapes}", hint="give the model it was trained on")
        if location.dtype not in ITEM_BYTES:
            what = f"is stored as {location.dtype}, not as one of {', '.join(ITEM_BYTES)}"
            raise UserError(f"{model}: {module}.weight {what}", hint="fuse into the original, unquantised model")
        found[module] = location
    return dict(sorted(found.items(), key=lambda item: (item[1].file.name, item[1].start)))


def read_factors(adapter: Adapter, module: str) -> tuple[np.ndarray, np.ndarray]:
    """A [r, in] and scale * B [out, r], float32.

    Raises:
        UserError: a number that is not finite: a training that diverged.
    """
    a, b = (read_float32(location) for location in adapter.pairs[module])
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        place = adapter.pairs[module][0].file
        raise UserError(
            f"{place}: {module} has numbers that are not finite",
            hint="the training diverged: take an earlier checkpoint",
        )
    return a, np.float32(adapter.scale) * b


def _rank_and_scale(path: Path) -> tuple[int, float]:
    config = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is not LORA", hint="only plain LoRA can be fused")
    refused = {key: value for key, value in config.items() if value and key not in READ | IDLE}
    if config.get("bias", "none") != "none":
        refused["bias"] = config["bias"]
    # The others (pissa, olora, loftq ...) change the base weights when peft loads them
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        refused["init_lora_weights"] = config["init_lora_weights"]
    for key, value in refused.items():
        raise UserError(f"{path}: {key} is {value!r}, which cannot be fused yet", hint="only plain LoRA can be fused")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{path}: r {rank!r} and lora_alpha {alpha!r} are not a whole number and a number")
    return rank, float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _files_to_copy(model: Path) -> Iterator[Path]:
    """The model's own safetensors, and every file beside them that is neither hidden nor weights in another form."""
    yield from weight_files(model)
    for path in sorted([*model.iterdir(), *model.glob("additional_chat_templates/*")]):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(OTHER_WEIGHTS):
            yield path


def _copy(source: Path, target: Path) -> None:
    """A file of its own, writable; on APFS a clone, which takes neither time nor space until it is changed."""
    target.parent.mkdir(exist_ok=True)
    if not (sys.platform == "darwin" and _clone(source, target)):
        shutil.copyfile(source, target)
    target.chmod(0o644)


def _clone(source: Path, target: Path) -> bool:
    """clonefile(2); false where the file system cannot, or where source and target lie on two of them."""
    libc: Any = ctypes.CDLL(None)
    return libc.clonefile(os.fsencode(source), os.fsencode(target), 0) == 0


def _patch(copy: Path, location: TensorLocation, adapter: Adapter, module: str) -> int:
    """Adds the module's change to its tensor in the copy, and counts the numbers that are not what they were."""
    a, b = read_factors(adapter, module)
    rows, width = location.shape
    step = max(1, BLOCK // max(1, width))
    changed = 0
    with copy.open("r+b") as file:
        for row in range(0, rows, step):
            change = b[row : row + step] @ a
            start = location.start + row * width * ITEM_BYTES[location.dtype]
            changed += _add(file, start, change, location.dtype, module)
    return changed


def _add(file: IO[bytes], start: int, change: np.ndarray, dtype: str, module: str) -> int:
    file.seek(start)
    before = file.read(change.size * ITEM_BYTES[dtype])
    after = from_float32(to_float32(before, dtype) + change.reshape(-1), dtype)
    if not np.isfinite(to_float32(after, dtype)).all():
        raise UserError(f"{module}.weight: the sum has numbers that {dtype} cannot hold", hint="take an earlier checkpoint")
    file.seek(start)
    file.write(after)
    item = f"<u{ITEM_BYTES[dtype]}"
    return int(np.count_nonzero(np.frombuffer(before, item) != np.frombuffer(after, item)))
