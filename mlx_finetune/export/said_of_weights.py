"""What a file of weights says besides its tensors and its vocabulary: texts that go out with it."""

import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from mlx_finetune.errors import UserError

BROKEN = "make it again with mlx-finetune fuse or export"


def said_of_weights(path: Path) -> Iterator[str]:
    """The metadata of a safetensors file, the single texts of a GGUF file; each with its name before it.

    Raises:
        UserError: it is no such file, or the package that reads GGUF is not installed.
    """
    found = _safetensors(path) if path.suffix == ".safetensors" else _gguf(path) if path.suffix == ".gguf" else {}
    yield from (f"{name}: {value}" for name, value in found.items())


def _safetensors(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not safetensors: {error}", hint=BROKEN) from error


def _gguf(path: Path) -> dict[str, str]:
    if find_spec("gguf") is None:
        raise UserError(f"{path}: looked through with the package gguf, which is not installed", "pip install 'mlx-finetune[gguf]'")
    import gguf

    try:
        fields = gguf.GGUFReader(path).fields
        return {name: field.contents() for name, field in fields.items() if field.types[:1] == [gguf.GGUFValueType.STRING]}
    except (ValueError, LookupError, OverflowError, OSError, struct.error) as error:
        raise UserError(f"{path}: not GGUF: {' '.join(str(error).split())[:120]}", hint=BROKEN) from error
