"""Whether the weights of a packed folder are those of the original: each within a step of its quantisation, read piece by piece."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_finetune.engines.mlx.load import open_model
from mlx_finetune.engines.mlx.pack import NUMBERS

# Half a step, and up to one more where MLX moves the scale so that the largest weight is exact and the other end is clipped.
STEPS = 1.5
SUBNORMAL = 2.0**-24  # between neighbours among the smallest numbers of float16
HALF = 2.0**-8  # of a number: what rounding it to bfloat16 may take
OF_LARGEST = 0.26  # of a group in 4 bits of floating point: 8 is stored as 6, the largest there is
OF_SCALE, LEAST = 2.0**-4, 2.0**-10  # nvfp4's scale has 4 bits of precision, and rounds to 0 below this


def farthest_weight(model: Path, made: Path) -> float:
    """The largest distance of a stored weight from the original's, over what its quantisation may take; 1 and less is right.

    What is not packed has to be the original, rounded to its dtype; infinite where it is not.
    """
    originals = dict(tree_flatten(open_model(model)[0].parameters()))
    network, _ = open_model(made)
    modules = tree_flatten(network.leaf_modules(), is_leaf=nn.Module.is_module)
    farthest = 0.0
    for path, module in modules:
        for name, value in tree_flatten(module.parameters()):
            whole = f"{path}.{name}" if path else name
            if "scales" in module and name == "weight" and f"{path}.scales" not in originals:
                farthest = max(farthest, _farthest(originals.pop(whole), module))
            elif "scales" not in module or name == "bias" or f"{path}.scales" in originals:
                original = originals.pop(whole) if name != "scales" else originals[whole]
                if not mx.array_equal(original.astype(value.dtype), value):
                    return float("inf")
        module.update(tree_map(lambda _: mx.array([]), module.parameters()))
    return farthest


def _farthest(original: mx.array, module: Any) -> float:
    """Of one module, some rows or experts at a time; NaN counts as infinite."""
    rows, found = original.shape[0], 0.0
    step = max(1, NUMBERS * rows // original.size)
    for start in range(0, rows, step):
        packed, scales = (module[name][start : start + step] for name in ("weight", "scales"))
        biases = module.get("biases")
        biases = None if biases is None else biases[start : start + step]
        how = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        stored = mx.dequantize(packed, scales, biases, dtype=mx.float32, **how)
        weight = original[start : start + step].astype(mx.float32)
        distance = mx.abs(stored - weight) / (_allowed(weight, scales, biases, module) + HALF * mx.abs(weight) + 1e-30)
        largest = float(distance.max())
        found = max(found, largest) if largest == largest else float("inf")
    return found


def _allowed(weight: mx.array, scales: mx.array, biases: mx.array | None, module: Any) -> mx.array:
    """What packing may take of each number, [..., columns]."""
    if biases is None:
        groups = mx.abs(weight).reshape(*weight.shape[:-1], -1, module.group_size)
        allowed = OF_LARGEST * groups.max(axis=-1)
        if module.mode == "nvfp4":
            allowed = (1 + OF_SCALE / OF_LARGEST) * allowed + 6 * LEAST
    else:
        wide, bias = mx.abs(scales.astype(mx.float32)), mx.abs(biases.astype(mx.float32))
        smallest = SUBNORMAL if scales.dtype == mx.float16 else 0.0
        allowed = STEPS * wide + HALF * (bias + 2.0**module.bits * wide) + 2.0**module.bits * smallest
    return mx.repeat(allowed, module.group_size, axis=-1)
