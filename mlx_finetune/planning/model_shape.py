"""What a model is made of, from config.json and the headers of its safetensors; no weight is read or downloaded."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.models.config_checks import check_config
from mlx_finetune.models.hub import HUB_ID
from mlx_finetune.models.mlx_config import max_exact_length
from mlx_finetune.models.mlx_proven import PROVEN
from mlx_finetune.models.weights import tensor_headers
from mlx_finetune.planning.architectures import Layers, read_layers

GROUP = 64  # of MLX's quantisation, where nothing else is said
BITS_OF = {"F32": 32, "BF16": 16, "F16": 16}
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
UNLIKE = 0.02  # share by which files and config.json may differ: some files hold constants too, such as RoPE's
Stored = tuple[str, tuple[int, ...], int]  # of a tensor: dtype, shape, bytes


@dataclass(frozen=True)
class Quantisation:
    """MLX's affine quantisation: each group of weights shares a scale and a bias of 16 bits."""

    bits: int
    group: int


@dataclass(frozen=True)
class ModelShape:
    """A model as the planner knows it; `bytes_by_dtype` comes from the files, and is empty where there are none."""

    name: str
    sizes: Layers
    dtype: str  # of the weights as stored: F32, BF16, F16; of the scales where quantised
    quantisation: Quantisation | None
    bytes_by_dtype: Mapping[str, int]
    remarks: tuple[str, ...] = ()

    @property
    def matrices(self) -> int:
        """Parameters in matrices, embeddings and head included: those that quantisation packs."""
        return self.layer_matrices * self.sizes.layers + self.embeddings

    @property
    def layer_matrices(self) -> int:
        """Parameters in the matrices of one layer."""
        return sum(rows * columns for rows, columns in self.sizes.linears.values())

    @property
    def embeddings(self) -> int:
        """Parameters of the embeddings, and of the head where it is not the same matrix."""
        return self.sizes.vocabulary * self.sizes.hidden * (1 if self.sizes.tied else 2)

    @property
    def parameters(self) -> int:
        """All of them, as published: a quantised model has as many as the original."""
        return self.matrices + self.sizes.vectors

    @property
    def stored_bits(self) -> int:
        """Bits of a weight as stored: 32, 16, or those of the quantisation."""
        return self.quantisation.bits if self.quantisation else BITS_OF[self.dtype]

    def weight_bytes(self, bits: int | None = None) -> int:
        """Bytes of the weights in memory, once they have `bits` each: 32, 16, or quantised to 8, 4...; None: as stored.

        Raises:
            UserError: a quantised model does not become a better one.
        """
        if bits is None or bits == self.stored_bits:
            if self.bytes_by_dtype:
                return sum(self.bytes_by_dtype.values())
            bits = self.stored_bits
        if self.quantisation and bits != self.stored_bits:
            raise UserError(
                f"{self.name}: quantised to {self.stored_bits} bits, not to {bits}", hint="plan with the original model"
            )
        if bits in (16, 32):
            return self.parameters * bits // 8
        group = self.quantisation.group if self.quantisation else GROUP
        vector_bytes = 4 if self.quantisation and self.dtype == "F32" else 2  # one that is packed yet is brought to 16 bits first
        return self.matrices * bits // 8 + self.matrices // group * 2 * vector_bytes + self.sizes.vectors * vector_bytes


def model_shape(name: str) -> ModelShape:
    """The model called `name`: a folder, a config.json alone, or a hub id, of which only headers are fetched.

    Raises:
        UserError: neither of them, an architecture that is not known here, damaged files, or the Hub does not give them.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(f"{name}: no config.json", hint="give the Hugging Face folder that holds it, or a Hub id")
        found = _stored_locally(local)
        return shape_of(read_json(local / "config.json"), name, found)
    if local.is_file():
        return shape_of(read_json(local), name, ())
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{name}: no such model folder", hint="give a local folder, a config.json, or a Hub id such as org/name")
    from mlx_finetune.planning.hub_headers import fetch_headers

    config, stored = fetch_headers(name)
    return shape_of(config, name, stored)


def shape_of(config: Any, name: str, stored: Iterable[Stored]) -> ModelShape:
    """The model of this config.json; `stored`: its tensors as they lie in the files, none where only the config is known.

    Raises:
        UserError: an architecture or a quantisation that is not known here, or files of another model.
    """
    check_config(config, f"{name}: config.json")
    sizes = read_layers(config, f"{name}: config.json")
    exact = max_exact_length(config) if sizes.architecture in PROVEN else None  # beyond it, train refuses with MLX
    if exact and (sizes.longest or exact) >= exact:
        sizes = replace(sizes, longest=exact)
    quantisation = _quantisation(config, name)
    by_dtype: dict[str, int] = {}
    elements = 0
    for dtype, tensor, size in stored:
        by_dtype[dtype] = by_dtype.get(dtype, 0) + size
        elements += prod(tensor)
    remarks = tuple(_remarks(config, bool(by_dtype)))
    shape = ModelShape(name, sizes, _dtype(config, by_dtype), quantisation, by_dtype, remarks)
    if by_dtype and not quantisation and abs(elements - shape.parameters) > UNLIKE * shape.parameters:
        raise UserError(
            f"{name}: config.json speaks of {shape.parameters:,} parameters, the files hold {elements:,}",
            hint="are they of the same model? then its architecture has parts that no plan knows of",
        )
    return shape


def _remarks(config: Mapping[str, Any], has_files: bool) -> Iterator[str]:
    if not has_files:
        yield "its safetensors are not here: sizes are computed from config.json"
    if config["model_type"] not in PROVEN:
        yield f"this version does not train {config['model_type']} with MLX: --engine torch"


def _stored_locally(folder: Path) -> list[Stored]:
    if not any(folder.glob("*.safetensors")):
        return []
    return [(one.dtype, one.shape, one.end - one.start) for one in tensor_headers(folder).values()]


def _quantisation(config: Mapping[str, Any], name: str) -> Quantisation | None:
    given = config.get("quantization")
    if isinstance(given, dict) and isinstance(given.get("bits"), int):
        return Quantisation(given["bits"], given.get("group_size", GROUP))
    other = config.get("quantization_config")
    if other:
        method = other.get("quant_method", "unknown method") if isinstance(other, dict) else "unknown method"
        raise UserError(f"{name}: quantised checkpoint ({method}): not supported", hint="plan with the original checkpoint")
    return None


def _dtype(config: Mapping[str, Any], by_dtype: Mapping[str, int]) -> str:
    """Of most floating numbers in the files; as config.json says where there are none; bfloat16 where that is silent."""
    floating = {dtype: size for dtype, size in by_dtype.items() if dtype in BITS_OF}
    if floating:
        return max(floating, key=lambda dtype: floating[dtype])
    return NAMES.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
