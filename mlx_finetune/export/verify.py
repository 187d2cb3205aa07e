"""Proof that the fused folder is the base with its adapter: both are run, and their logits compared.

Base + adapter comes from the checkpoint folder, not from the fused file: opened by peft where torch is installed,
else added to the weights that MLX loaded.
"""

import gc
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlx_finetune.export.fuse import (
    CONFIG,
    LORA_A,
    LORA_B,
    PREFIX,
    TENSORS,
    Fused,
    Progress,
    base_weights,
    fuse_into,
    read_adapter,
    write_template,
)
from mlx_finetune.files import atomic_folder, read_json
from mlx_finetune.models.weights import tensor_headers

Backend = Literal["transformers", "mlx"]

TOLERANCE = 1e-3  # between two float32 sums of the same numbers in another order, many layers deep
NOISE = 1e-5  # of the largest logit: below this float32 cannot say which of two models is nearer
TIES = 0.1  # of the rounding's own effect: two float32 sums now and then round to either side of a tie
# What a tuned model is compared on: prose, a gptme turn, code.
PROBE_TEXTS = (
    "The capital of France is Paris, and the river that runs through it is called the Seine.",
    "Let me see what fails first.\n\n```shell\npytest -q 2>&1 | tail -40\n```",
    "def add(a: int, b: int) -> int:\n    return a + b\n\nassert add(2, 3) == 5\n",
)
LONGEST = 256  # tokens of a text that are compared, so that the logits fit in memory


class VerificationError(RuntimeError):
    """The fused weights are not base + adapter: a fault of this program, never of its user."""


@dataclass(frozen=True)
class Verified:
    """What the comparison of the fused model with base + adapter found, over every position of the texts.

    missing, unexpected: tensors that the fused folder lacks or has too many, those left out that the base has alike.
    largest_difference, largest_logit: absolute, of single logits; largest_logit is of base + adapter.
    kl: mean over the positions of KL(base + adapter || fused), nats.
    tolerance: 1e-3 for float32; for BF16 and F16 besides what rounding the same sum costs, measured (see `_compare`).
    """

    backend: Backend
    missing: list[str]
    unexpected: list[str]
    largest_difference: float
    largest_logit: float
    kl: float
    tolerance: float
    passed: bool


@dataclass(frozen=True)
class Distance:
    """How far logits lie from the reference: largest and root mean square of the differences, and mean KL in nats."""

    largest: float
    rms: float
    kl: float


@dataclass(frozen=True)
class Distances:
    """From base + adapter to the base alone, to the same sum rounded as it is stored, and to the fused folder.

    fused_to_rounded tells a rounded weight from a wrong one, which could hide behind the rounding of all the others.
    """

    base: Distance
    rounded: Distance
    fused: Distance
    fused_to_rounded: Distance
    largest_logit: float
    missing: list[str]
    unexpected: list[str]


def fuse_and_verify(
    model: Path, checkpoint: Path, out: Path, texts: Sequence[str], progress: Progress | None = None, template: str = ""
) -> tuple[Fused, Verified]:
    """`fuse`, then `verify`; `out` appears only if the fused model passed. `template`: the chat template that was trained.

    Raises:
        UserError: as `fuse`.
        VerificationError: the fused model is not base + adapter; nothing is left.
    """
    with atomic_folder(out) as folder:
        fused = fuse_into(model, checkpoint, folder, progress)
        if template:
            write_template(folder, template)
        verified = verify(model, checkpoint, folder, texts)
        if not verified.passed:
            raise VerificationError(f"{out} was not written: the fused model is not base + adapter: {verified}")
    return fused, verified


def verify(model: Path, checkpoint: Path, fused: Path, texts: Sequence[str]) -> Verified:
    """Compares the folder `fused` with `model` + the adapter of `checkpoint`, in float32, one model at a time.

    Runs in transformers and peft where torch and peft are installed, else in MLX; the result says which. Passes when no
    key is missing or unexpected, the largest difference is within the tolerance, the fused model is nearer to
    base + adapter than the base alone is, and differs from it by no more than the rounding of the stored weights.
    Of each text the first 256 tokens are compared.
    """
    tokens = _tokens(model, texts)
    backend: Backend = "transformers" if find_spec("torch") and find_spec("peft") else "mlx"
    measure = {"transformers": _in_transformers, "mlx": _in_mlx}[backend]
    stored = _stored_dtypes(model, checkpoint)
    return _compare(backend, measure(model, checkpoint, fused, tokens, stored), bool(stored))


def _compare(backend: Backend, found: Distances, is_rounded: bool) -> Verified:
    """A fused model within 1e-3 of the rounded sum lies within 1e-3 + the rounding of base + adapter: the tolerance."""
    tolerance = TOLERANCE + (found.rounded.largest if is_rounded else 0.0)
    only_rounded = found.fused_to_rounded.rms <= TIES * found.rounded.rms + NOISE * found.largest_logit
    nearer = found.fused.rms < found.base.rms or found.fused.rms <= NOISE * found.largest_logit
    return Verified(
        backend=backend,
        missing=found.missing,
        unexpected=found.unexpected,
        largest_difference=found.fused.largest,
        largest_logit=found.largest_logit,
        kl=found.fused.kl,
        tolerance=tolerance,
        passed=not (found.missing or found.unexpected) and found.fused.largest <= tolerance and only_rounded and nearer,
    )


def _tokens(model: Path, texts: Sequence[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    tokens = [list(tokenizer(text)["input_ids"])[:LONGEST] for text in texts]
    assert any(tokens), "nothing to compare"
    return [row for row in tokens if row]


def _distance(reference: Sequence[np.ndarray], other: Iterable[np.ndarray]) -> Distance:
    """Over logits [T, V] of each text; NaN anywhere makes it NaN, which passes no comparison."""
    largest, squares, numbers, divergence, positions = 0.0, 0.0, 0, 0.0, 0
    for expected, found in zip(reference, other, strict=True):
        difference = np.abs(expected - found)
        largest = float(np.maximum(largest, difference.max()))
        squares += float(np.square(difference, dtype=np.float64).sum())
        numbers += difference.size
        divergence += sum(_kl(*rows) for rows in zip(expected, found, strict=True))
        positions += len(expected)
    return Distance(largest, (squares / numbers) ** 0.5, divergence / positions)


def _kl(expected: np.ndarray, found: np.ndarray) -> float:
    """KL(expected || found) of two rows of logits [V], nats, in float64."""
    log_p, log_q = (_log_softmax(row.astype(np.float64)) for row in (expected, found))
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def _log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row - row.max()
    return shifted - np.log(np.exp(shifted).sum())


def _largest(logits: Sequence[np.ndarray]) -> float:
    return float(max(np.abs(rows).max() for rows in logits))


def _stored_dtypes(model: Path, checkpoint: Path) -> dict[str, str]:
    """Module -> dtype, for the adapted modules that are stored in less than float32."""
    weights = base_weights(model, read_adapter(checkpoint))
    return {module: location.dtype for module, location in weights.items() if location.dtype != "F32"}


def _in_transformers(
    model: Path, checkpoint: Path, fused: Path, tokens: Sequence[Sequence[int]], stored: dict[str, str]
) -> Distances:
    from peft import PeftModel

    base, base_keys = _load_transformers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for names that it is about to change
        tuned = PeftModel.from_pretrained(base, checkpoint).eval()
    reference = list(_transformers_logits(tuned, tokens))
    with tuned.disable_adapter():
        from_base = _distance(reference, _transformers_logits(tuned, tokens))
    merged = tuned.merge_and_unload()
    _round_torch(merged, stored)
    rounded = list(_transformers_logits(merged, tokens))
    del base, tuned, merged
    gc.collect()  # one model in memory at a time
    loaded, keys = _load_transformers(fused)
    found = list(_transformers_logits(loaded, tokens))
    return Distances(
        base=from_base,
        rounded=_distance(reference, rounded),
        fused=_distance(reference, found),
        fused_to_rounded=_distance(rounded, found),
        largest_logit=_largest(reference),
        missing=sorted(keys["missing_keys"] - base_keys["missing_keys"]),
        unexpected=sorted(keys["unexpected_keys"] - base_keys["unexpected_keys"]),
    )


def _load_transformers(folder: Path) -> tuple[Any, dict[str, set[str]]]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, keys = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, trust_remote_code=False
    )
    return model.eval(), {kind: {str(name) for name in names} for kind, names in keys.items()}


def _transformers_logits(model: Any, tokens: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    import torch

    for row in tokens:
        with torch.inference_mode():
            yield model(torch.tensor([row])).logits[0].float().numpy()


def _round_torch(model: Any, stored: dict[str, str]) -> None:
    """The merged weights as the fused folder must store them, rounded by torch."""
    import torch

    for module, dtype in stored.items():
        weight = model.get_submodule(module).weight.data
        weight.copy_(weight.to({"BF16": torch.bfloat16, "F16": torch.float16}[dtype]))


def _in_mlx(model: Path, checkpoint: Path, fused: Path, tokens: Sequence[Sequence[int]], stored: dict[str, str]) -> Distances:
    from mlx_finetune.engines.mlx.load import load_model

    network = load_model(model, "float32")
    base = list(_mlx_logits(network, tokens))
    _add_to_mlx(network, checkpoint)
    reference = list(_mlx_logits(network, tokens))
    _round_mlx(network, stored)
    rounded = list(_mlx_logits(network, tokens))
    del network
    gc.collect()  # one model in memory at a time
    found = list(_mlx_logits(load_model(fused, "float32"), tokens))
    names = [set(tensor_headers(folder)) for folder in (model, fused)]
    return Distances(
        base=_distance(reference, base),
        rounded=_distance(reference, rounded),
        fused=_distance(reference, found),
        fused_to_rounded=_distance(rounded, found),
        largest_logit=_largest(reference),
        missing=sorted(names[0] - names[1]),
        unexpected=sorted(names[1] - names[0]),
    )


def _mlx_logits(network: Any, tokens: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    import mlx.core as mx

    for row in tokens:
        yield np.array(network(mx.array([row]))[0].astype(mx.float32))


def _add_to_mlx(network: Any, checkpoint: Path) -> None:
    """Adds scale * B @ A to the loaded float32 weights; MLX reads the checkpoint, lest `fuse` be proven by itself."""
    import mlx.core as mx

    config = read_json(checkpoint / CONFIG)
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    stored: Any = mx.load(str(checkpoint / TENSORS))
    tensors = {name: np.array(value.astype(mx.float32)) for name, value in stored.items()}
    modules = dict(network.named_modules())
    for module in (name.removeprefix(PREFIX).removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)):
        if module not in modules:
            raise VerificationError(f"{module}: MLX has no module of this name to add the adapter to")
        change = scale * (tensors[PREFIX + module + LORA_B] @ tensors[PREFIX + module + LORA_A])
        modules[module].weight = modules[module].weight + mx.array(change, mx.float32)
        mx.eval(modules[module].weight)


def _round_mlx(network: Any, stored: dict[str, str]) -> None:
    """The weights as the fused folder must store them, rounded by MLX."""
    import mlx.core as mx

    modules = dict(network.named_modules())
    for module, dtype in stored.items():
        rounded = modules[module].weight.astype({"BF16": mx.bfloat16, "F16": mx.float16}[dtype])
        modules[module].weight = rounded.astype(mx.float32)
        mx.eval(modules[module].weight)
