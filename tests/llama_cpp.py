"""llama.cpp's own C interface, out of the library that the package xllamacpp brings: token ids, logits, adapters.

Its large settings are passed as it gives them, so their layout need not be known: a structure that is passed by value and
is longer than it has to be does no harm, and what is set besides is set through functions.
"""

import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_finetune.export.gguf_kinds import OWN_SYMBOLS

POINTER, TEXT, INT, BOOL = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_bool


class Opaque(ctypes.Structure):
    """A structure of llama.cpp's, of at most a kilobyte."""

    _fields_ = [("bytes", ctypes.c_uint8 * 1024)]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_model_default_params": (Opaque, []),
    "llama_context_default_params": (Opaque, []),
    "llama_model_load_from_file": (POINTER, [TEXT, Opaque]),
    "llama_init_from_model": (POINTER, [POINTER, Opaque]),
    "llama_model_free": (None, [POINTER]),
    "llama_free": (None, [POINTER]),
    "llama_model_get_vocab": (POINTER, [POINTER]),
    "llama_vocab_n_tokens": (INT, [POINTER]),
    "llama_vocab_is_eog": (BOOL, [POINTER, INT]),
    "llama_tokenize": (INT, [POINTER, TEXT, INT, POINTER, INT, BOOL, BOOL]),
    "llama_batch_get_one": (Opaque, [POINTER, INT]),
    "llama_decode": (INT, [POINTER, Opaque]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [POINTER, INT]),
    "llama_get_memory": (POINTER, [POINTER]),
    "llama_memory_clear": (None, [POINTER, BOOL]),
    "llama_set_n_threads": (None, [POINTER, INT, INT]),
    "llama_adapter_lora_init": (POINTER, [POINTER, TEXT]),
    "llama_set_adapters_lora": (INT, [POINTER, ctypes.POINTER(POINTER), ctypes.c_size_t, ctypes.POINTER(ctypes.c_float)]),
    "llama_log_set": (None, [POINTER, POINTER]),
    "llama_backend_init": (None, []),
}


@cache
def library() -> Any:
    """The library, with the types of what is called here; skips the test where the package is not installed."""
    spec = find_spec("xllamacpp")
    folders = list((spec and spec.submodule_search_locations) or ())
    paths = [path for folder in folders for path in Path(folder).glob("xllamacpp*.so")]
    if not paths:
        pytest.skip("xllamacpp is not installed: it brings llama.cpp, which runs the GGUF files")
    found = ctypes.CDLL(str(paths[0]), OWN_SYMBOLS)
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, TEXT, POINTER)(lambda level, text, data: None)
    found.quiet = quiet  # else it is collected while the library still calls it
    found.llama_log_set(ctypes.cast(quiet, POINTER), None)
    found.llama_backend_init()
    return found


def _exact(settings: Opaque) -> Opaque:
    """Attention in float32 throughout: no flash attention, which rounds to float16, nor keys and values kept in it.

    type_k and type_v stand between two pairs of empty pointers, flash_attn_type 52 bytes before them.
    """
    stored = bytes(settings.bytes)
    types = stored.index(bytes(16) + struct.pack("<2i", 1, 1) + bytes(16)) + 16
    assert struct.unpack_from("<i", stored, types - 52) == (-1,)  # as it sees fit
    for place in (types, types + 4, types - 52):
        ctypes.memset(ctypes.addressof(settings) + place, 0, 4)
    return settings


class Llama:
    """A GGUF file that llama.cpp has loaded; on the CPU, with one thread and 512 positions."""

    def __init__(self, path: Path) -> None:
        self.library = library()
        self.model = self.library.llama_model_load_from_file(str(path).encode(), self.library.llama_model_default_params())
        assert self.model, f"llama.cpp does not load {path}"
        self.context = self.library.llama_init_from_model(self.model, _exact(self.library.llama_context_default_params()))
        assert self.context
        self.library.llama_set_n_threads(self.context, 1, 1)
        self.vocab = self.library.llama_model_get_vocab(self.model)

    def close(self) -> None:
        """Frees it."""
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)

    def ids(self, text: str, special: bool = False) -> list[int]:
        """Token ids; control tokens in the text are read as such. `special`: with what stands around every text."""
        data = text.encode()
        room = (INT * (len(data) + 8))()
        count = self.library.llama_tokenize(self.vocab, data, len(data), room, len(room), special, True)
        assert count >= 0
        return list(room[:count])

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 [T, vocabulary]: after each token, of a text that begins with the first."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        size = self.library.llama_vocab_n_tokens(self.vocab)
        rows = []
        for token in tokens:
            one = (INT * 1)(token)
            assert self.library.llama_decode(self.context, self.library.llama_batch_get_one(one, 1)) == 0
            rows.append(np.ctypeslib.as_array(self.library.llama_get_logits_ith(self.context, -1), (size,)).copy())
        return np.stack(rows)

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The `count` most likely tokens that follow, each after the ones before; fewer where a turn ends."""
        found: list[int] = []
        row = self.logits(tokens)[-1]
        for _ in range(count):
            found.append(int(row.argmax()))
            if self.library.llama_vocab_is_eog(self.vocab, found[-1]):
                break
            one = (INT * 1)(found[-1])
            assert self.library.llama_decode(self.context, self.library.llama_batch_get_one(one, 1)) == 0
            row = np.ctypeslib.as_array(self.library.llama_get_logits_ith(self.context, -1), row.shape).copy()
        return found

    def adapt(self, path: Path) -> None:
        """Adds the LoRA adapter of a GGUF file, at its full strength."""
        adapter = self.library.llama_adapter_lora_init(self.model, str(path).encode())
        assert adapter, f"llama.cpp does not load the adapter {path}"
        adapters, scales = (POINTER * 1)(adapter), (ctypes.c_float * 1)(1.0)
        assert self.library.llama_set_adapters_lora(self.context, adapters, 1, scales) == 0


@contextmanager
def opened(path: Path) -> Iterator[Llama]:
    """The file in llama.cpp, freed at the end."""
    llama = Llama(path)
    try:
        yield llama
    finally:
        llama.close()
