"""How the numbers of a GGUF are stored: which type each tensor gets, and a block of rows in that type.

Float types, q8_0 and q4_0 are numpy's and the `gguf` package's work. K-quants are computed by llama.cpp's own
`ggml_quantize_chunk`, which a Python package with llama.cpp inside exports; which tensors get more bits is llama.cpp's
rule too (src/llama-quant.cpp, `llama_tensor_get_type_impl`).
"""

import ctypes
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.models.weights import from_float32
from mlx_finetune.nearest import did_you_mean

Encode = Callable[[np.ndarray], bytes]

# kind -> (file type of llama.cpp, type of most matrices, type of the head and of embeddings that are the head)
KINDS: Mapping[str, tuple[str, str, str]] = {
    "f32": ("ALL_F32", "F32", "F32"),
    "f16": ("MOSTLY_F16", "F16", "F16"),
    "bf16": ("MOSTLY_BF16", "BF16", "BF16"),
    "q8_0": ("MOSTLY_Q8_0", "Q8_0", "Q8_0"),
    "q4_0": ("MOSTLY_Q4_0", "Q4_0", "Q8_0"),
    "q4_k_m": ("MOSTLY_Q4_K_M", "Q4_K", "Q6_K"),
    "q5_k_m": ("MOSTLY_Q5_K_M", "Q5_K", "Q6_K"),
    "q6_k": ("MOSTLY_Q6_K", "Q6_K", "Q6_K"),
}
K_QUANTS = ("q4_k_m", "q5_k_m", "q6_k")
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # where rows are no whole blocks of 256
BY_LLAMA = ("Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1")  # what a K-quant file holds besides Q8_0 and floats
LIBRARIES = {"xllamacpp": ("xllamacpp*.so", "xllamacpp*.pyd"), "llama_cpp": ("lib/libggml-base.*", "lib/ggml-base.dll")}
# A library's own symbols before those of others: with a BLAS loaded for all, llama.cpp would else stop with bad_alloc.
OWN_SYMBOLS = ctypes.RTLD_LOCAL | getattr(os, "RTLD_NOW", 0) | getattr(os, "RTLD_DEEPBIND", 0)
INSTALL = "pip install xllamacpp, or take q8_0"


LARGEST = {"F32": math.inf, "BF16": 3.38e38}  # others, and the scales of quantised blocks, are float16
LARGEST_OF_F16 = 65504.0


@dataclass(frozen=True)
class Storage:
    """A ggml type: numbers in a block, bytes of one, and `encode`, which makes them of float32 rows."""

    name: str
    block: int
    block_bytes: int
    encode: Encode

    @property
    def largest(self) -> float:
        """The largest number that it holds."""
        return LARGEST.get(self.name, LARGEST_OF_F16)

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row."""
        return columns // self.block * self.block_bytes


def check_kind(kind: str) -> None:
    """Raises UserError for a kind that is not known, or that takes llama.cpp where it is not installed."""
    if kind not in KINDS:
        raise UserError(
            f"kind {kind!r} is none of {', '.join(KINDS)}",
            hint=did_you_mean(kind, KINDS, "q8_0 is half the size of f16 and hardly worse"),
        )
    if kind in K_QUANTS:
        _ggml()


def type_of(kind: str, name: str, shape: tuple[int, ...], layers: int, tied: bool) -> str:
    """The ggml type of tensor `name` (llama.cpp's) of `layers` layers; `tied`: the embeddings are the head as well."""
    _, most, head = KINDS[kind]
    if len(shape) == 1 or "_norm." in name:
        return "F32"
    wanted = head if name == "output.weight" or (tied and name == "token_embd.weight") else _more_bits(kind, name, layers, most)
    return _that_fits(wanted, shape[-1])


def _more_bits(kind: str, name: str, layers: int, most: str) -> str:
    """What llama.cpp gives the tensors that suffer most: values and the way down, in the outer layers and every third."""
    if kind not in ("q4_k_m", "q5_k_m") or not name.startswith("blk."):
        return most
    _, layer, part, _ = name.split(".")
    number, eighth = int(layer), layers // 8
    outer = number < eighth or number >= 7 * layers // 8 or (number - eighth) % 3 == 2
    return "Q6_K" if outer and part in ("attn_v", "attn_qkv", "ffn_down") else most


def _that_fits(wanted: str, columns: int) -> str:
    """Rows are whole blocks; where they are not, a type of smaller ones."""
    for name in (wanted, FALLBACK.get(wanted, wanted)):
        if columns % _sizes(name)[0] == 0:
            return name
    return "F16"


def storage(name: str) -> Storage:
    """The type of that name, of gguf.GGMLQuantizationType."""
    block, size = _sizes(name)
    return Storage(name, block, size, _encoder(name))


def file_type(kind: str) -> int:
    """llama.cpp's number of the kind."""
    from gguf import LlamaFileType

    return int(LlamaFileType[KINDS[kind][0]])


def _sizes(name: str) -> tuple[int, int]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    sizes: tuple[int, int] = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    return sizes


def _encoder(name: str) -> Encode:
    if name in ("F32", "F16", "BF16"):
        return lambda rows: from_float32(rows, name)
    if name in BY_LLAMA:
        return lambda rows: _by_llama(rows, name)
    return lambda rows: _by_gguf(rows, name)


def _by_gguf(rows: np.ndarray, name: str) -> bytes:
    from gguf import GGMLQuantizationType, quants

    quantised: np.ndarray = quants.quantize(np.ascontiguousarray(rows, np.float32), GGMLQuantizationType[name])
    return quantised.tobytes()


def _by_llama(rows: np.ndarray, name: str) -> bytes:
    """Rows by themselves, on all cores: a call of llama.cpp's takes one, and Python's lock is free meanwhile."""
    parts = np.array_split(np.ascontiguousarray(rows, np.float32), min(len(rows), os.cpu_count() or 1))
    with ThreadPoolExecutor(len(parts)) as threads:
        return b"".join(threads.map(partial(_chunk, name=name), parts))


def _chunk(rows: np.ndarray, name: str) -> bytes:
    """size_t ggml_quantize_chunk(type, const float * src, void * dst, start, rows, columns, const float * importance)."""
    from gguf import GGMLQuantizationType

    target = ctypes.create_string_buffer(len(rows) * storage(name).row_bytes(rows.shape[1]))
    source = rows.ctypes.data_as(ctypes.c_void_p)
    written = _ggml()(int(GGMLQuantizationType[name]), source, target, 0, len(rows), rows.shape[1], None)
    assert written == len(target)
    return target.raw


@cache
def _ggml() -> Any:
    """ggml_quantize_chunk of the first installed package that exports it.

    Raises:
        UserError: there is none.
    """
    for package, patterns in LIBRARIES.items():
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for path in (path for pattern in patterns for path in sorted(Path(folder).glob(pattern))):
                function = getattr(ctypes.CDLL(str(path), OWN_SYMBOLS), "ggml_quantize_chunk", None)
                if function is not None:
                    whole = ctypes.c_int64
                    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, whole, whole, whole, ctypes.c_void_p]
                    function.restype = ctypes.c_size_t
                    return function
    raise UserError("K-quants are computed by llama.cpp, which is not installed", hint=INSTALL)
