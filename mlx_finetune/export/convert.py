"""From any checkpoint to a folder that MLX computes with exactly: written piece by piece, compared, then put in its place."""

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_finetune.errors import UserError
from mlx_finetune.export.memory import shortage
from mlx_finetune.export.stored_logits import probe_tokens, read_probe, write_probe
from mlx_finetune.export.verify_converted import Compared, Verified, verify_converted
from mlx_finetune.files import atomic_folder, half_made, read_json, refuse_existing, write_json
from mlx_finetune.installed import PACKAGES, versions
from mlx_finetune.models.config_checks import check_config
from mlx_finetune.models.importing import Source, as_hugging_face, copy_beside
from mlx_finetune.models.mlx_config import check_supported
from mlx_finetune.models.origin import Origin, write_origin
from mlx_finetune.models.plain_config import dtype_of, plain_config, with_dtype
from mlx_finetune.models.quantisation import Quantisation
from mlx_finetune.models.quantised_sources import check_not_packed, packed_by
from mlx_finetune.models.rewriting import rewrite
from mlx_finetune.models.weights import tensor_headers
from mlx_finetune.terminal import waiting
from mlx_finetune.training.memory_watch import loading

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class How:
    """What is to be made. verify: None compares where memory suffices, True refuses where it does not, False never compares."""

    quantisation: Quantisation | None = None
    dtype: str | None = None
    shard_size: int = 5 * 10**9
    verify: bool | None = None
    probe: Path | None = None
    write_probe: Path | None = None


@dataclass(frozen=True)
class Converted:
    """What was made: bytes of weights before and after, bits per weight of the whole, and what the comparison found.

    left_alone: modules whose width the group size does not divide, stored as they were. unverified: why nothing was compared.
    """

    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    quantization: dict[str, Any] | None
    left_alone: list[str]
    verified: Verified | None = None
    unverified: str = ""


def convert(source: Source, out: Path, how: How, progress: Progress) -> Converted:
    """Writes the folder `out`, which appears only when it is whole and, unless `how` says otherwise, proven.

    Raises:
        UserError: `out` exists; files that are broken; a model that MLX does not compute as transformers does.
        VerificationError: what was written is not what was to be written; nothing is left.
    """
    if how.write_probe:
        refuse_existing(how.write_probe, hint="choose another --write-probe")
    with atomic_folder(out) as folder, tempfile.TemporaryDirectory(dir=out.parent, prefix=half_made(out)) as scratch:
        if source.format != "gguf":
            _check(source.path, how)
        model = as_hugging_face(source, Path(scratch), progress)
        config = _check(model, how)
        short, fingerprint = _shortage(model, config), source.fingerprint()
        unverified = _unverified(model, config, how, short)
        probe = read_probe(how.probe, fingerprint) if how.probe else None
        if not (unverified or probe):
            probe_tokens(model)  # a tokenizer that cannot be read is found before weights are written
        made = _write(model, config, folder, how, progress)
        if not unverified:
            original = model if source.format == "gguf" else source.path
            what = Compared(original, model, folder, made.quantization is not None, how.dtype, whole=not short)
            doing = waiting("comparing what was written with the original")
            with doing, loading(model, "run it in float32", "--no-verify converts without running it"):
                verified, reference = verify_converted(what, probe)
            made = replace(made, verified=verified)
            if how.write_probe and reference:
                write_probe(how.write_probe, reference, fingerprint)
        made = replace(made, unverified=unverified or (short if not probe else ""))
        write_origin(folder, _origin(source, fingerprint, made, how.dtype or dtype_of(config)))
    return made


def _check(folder: Path, how: How) -> dict[str, Any]:
    """config.json of the folder; raises UserError for what MLX does not compute, or what cannot be packed."""
    config: dict[str, Any] = read_json(folder / "config.json")
    check_config(config, f"{folder / 'config.json'}")
    check_not_packed(folder, config, how.quantisation, how.dtype)
    check_supported(config)
    return config


def _shortage(model: Path, config: Mapping[str, Any]) -> str:
    """Why the original weights cannot be run here in float32; empty where they can."""
    if method := packed_by(config):
        return f"no other library here computes a checkpoint packed by {method}"
    short = shortage(model)
    return f"the original weights need {short}" if short else ""


def _unverified(model: Path, config: Mapping[str, Any], how: How, short: str) -> str:
    """Why nothing will be compared; empty where something will be. Raises UserError where that was asked for and cannot be."""
    is_packed = bool(how.quantisation or packed_by(config))
    if how.write_probe and (short or how.verify is False):
        hint = "leave --write-probe out" if short else "leave one out"
        raise UserError(f"--write-probe: {short or 'nothing is computed with --no-verify'}", hint=hint)
    if how.verify is False:
        return "--no-verify"
    if short and (how.verify or how.probe) and not (is_packed and how.probe):
        hint = "leave --verify and --probe out; quantised, --probe of convert --write-probe on a larger machine stands in"
        raise UserError(f"{model}: cannot be compared with the original: {short}", hint=hint)
    return short if not is_packed else ""


def _origin(source: Source, fingerprint: str, made: Converted, dtype: str | None) -> Origin:
    return Origin(
        format=source.format,
        model=source.name,
        revision=source.revision,
        fingerprint=fingerprint,
        quantization=made.quantization,
        dtype=dtype,
        versions=versions(PACKAGES),
        verified=asdict(made.verified) if made.verified else None,
    )


def _write(model: Path, config: Mapping[str, Any], folder: Path, how: How, progress: Progress) -> Converted:
    """Weights, config.json and what stands beside them."""
    tensors = tensor_headers(model).values()
    before = sum(tensor.end - tensor.start for tensor in tensors)
    written = with_dtype(plain_config(config), how.dtype) if how.dtype else plain_config(config)
    quantization, left_alone = None, []
    if how.quantisation or packed_by(config):
        from mlx_finetune.engines.mlx.pack import pack

        packed = pack(model, folder, how.quantisation, how.dtype, how.shard_size, progress)
        quantization, left_alone, bits, size = packed.quantization, packed.left_alone, packed.bits_per_weight, packed.bytes
        written |= {"quantization": quantization, "quantization_config": quantization}
    else:
        from mlx_finetune.engines.mlx.load import open_model

        open_model(model)  # reads no weight: every tensor has its place and shape, even where nothing will be compared
        size = rewrite(model, folder, how.dtype, progress)
        bits = 8 * size / sum(math.prod(tensor.shape) for tensor in tensors)
    write_json(folder / "config.json", written)
    copy_beside(model, folder)
    return Converted(before, size, bits, quantization, left_alone)
