"""A tiny checkpoint as AutoAWQ writes it (GEMM, 4 bits), and the same numbers unpacked: with numpy, in AutoAWQ's own order."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight columns in the 32 bits that hold them
GROUP = 32


def make_awq(model: Path, packed: Path, unpacked: Path, rounded: Path) -> None:
    """Quantises every linear layer of a Llama of `model` but the head, with zero points.

    unpacked: (number - zero) * scale, as AutoAWQ computes. rounded: number * scale - zero * scale, whose second product is in
    float16, as MLX stores it.
    """
    weights = load_file(model / "model.safetensors")
    one: dict[str, np.ndarray] = {}
    exact: dict[str, np.ndarray] = {}
    near: dict[str, np.ndarray] = {}
    for name, value in weights.items():
        if name.endswith("_proj.weight"):
            numbers, scales, zeros = quantise(value)
            path = name.removesuffix(".weight")
            one |= {f"{path}.qweight": pack(numbers.T), f"{path}.qzeros": pack(zeros.T), f"{path}.scales": scales.T.copy()}
            products = (zeros.astype(np.float32) * scales).astype(np.float16)
            zero, scale, product = (np.repeat(part.astype(np.float32), GROUP, axis=1) for part in (zeros, scales, products))
            exact[name], near[name] = (numbers - zero) * scale, numbers * scale - product
        else:
            one[name] = value.astype(np.float16)
            exact[name] = near[name] = one[name].astype(np.float32)
    for folder, tensors in ((packed, one), (unpacked, exact), (rounded, near)):
        shutil.copytree(model, folder)
        save_file(
            {name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
        )
    config = json.loads((packed / "config.json").read_text()) | {
        "dtype": "float16",
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    }
    (packed / "config.json").write_text(json.dumps(config))


def quantise(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers 0 to 15 [rows, columns]; scales in float16 and zero points [rows, groups]."""
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    low, high = groups.min(-1), groups.max(-1)
    scales = ((high - low) / 15).astype(np.float16)
    zeros = np.clip(np.round(-low / scales), 0, 15).astype(np.int64)
    numbers = np.clip(np.round(groups / scales[..., None].astype(np.float32)) + zeros[..., None], 0, 15).astype(np.int64)
    return numbers.reshape(weight.shape), scales, zeros


def pack(values: np.ndarray) -> np.ndarray:
    """[rows, columns] of 4 bits as int32 [rows, columns / 8]."""
    eight = values.reshape(values.shape[0], -1, 8)
    packed = sum(eight[..., column].astype(np.uint32) << np.uint32(4 * place) for place, column in enumerate(ORDER))
    return np.asarray(packed, np.uint32).view(np.int32)
