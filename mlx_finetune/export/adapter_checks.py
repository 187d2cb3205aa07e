"""Whether peft and mlx-lm make of an adapter folder the logits of the engine that trained it, one model at a time."""

import gc
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.export.backends import load_transformers, transformers_logits
from mlx_finetune.export.distance import ENGINES, TOLERANCE, VerificationError, choices, distance, largest
from mlx_finetune.export.in_engine import any_engine, exact_length, logits_of, on_cpu
from mlx_finetune.export.mlx_backend import mlx_logits
from mlx_finetune.export.probes import PROBE_TEXTS, bounded, spread_of, tokens_of
from mlx_finetune.training.memory_watch import loading

NOISE = 3e-5  # of the largest logit: below this nobody can say which of two models is nearer
Rows = Sequence[Sequence[int]]
Read = Callable[[Path, Path, Rows], tuple[list[np.ndarray], list[np.ndarray]]]


@dataclass(frozen=True)
class Reading:
    """How far the logits that a library makes of the folder lie from those of the engine.

    base: root mean square between the model without and with the adapter, to compare `rms` with; same: greedy tokens of `tokens`.
    """

    largest_difference: float
    rms: float
    base: float
    kl: float
    tolerance: float
    tokens: int
    same: int
    tied: int


@dataclass(frozen=True)
class Opened:
    """engine: whose logits are the reference. readers: by library. not_asked: libraries that are not installed here."""

    engine: str
    positions: int
    largest_logit: float
    readers: dict[str, Reading]
    not_asked: list[str]


def check_readers(model: Path, checkpoint: Path, folder: Path, formats: Sequence[str]) -> Opened:
    """Opens the folder with each library that it is for and that is installed.

    Raises:
        UserError: none of them is installed, so that nothing could be proven.
        VerificationError: one of them computes something else than the engine, or does not open it.
    """
    engine = any_engine(checkpoint)
    asked = [name for name in formats if name != "peft" or (find_spec("torch") and find_spec("peft"))]
    if not asked:
        raise UserError("an adapter for peft is proven by peft, which is not installed", hint="pip install 'mlx-finetune[torch]'")
    texts, spread = bounded(model, tokens_of(model, PROBE_TEXTS), spread_of(model, checkpoint))
    most = min((n for n in (exact_length(model, name) for name in (engine, *_engines(asked))) if n), default=None)
    rows = [row[:most] for row in [*texts, *spread]]
    reference = list(logits_of(model, checkpoint, engine, rows))
    highest = largest(reference)
    readers = {}
    for name in asked:
        with loading(model, "run it in float32"):
            base, found = READERS[name](model, folder, rows)
        readers[name] = _reading(reference, base, found, highest)
        if not _passes(readers[name], highest):
            raise VerificationError(f"{name} makes other logits of the adapter than the {engine} engine: {readers[name]}")
    return Opened(engine, sum(map(len, rows)), highest, readers, [name for name in formats if name not in asked])


def _engines(formats: Sequence[str]) -> list[str]:
    return ["mlx" if name == "mlx-lm" else "torch" for name in formats]


def _reading(reference: list[np.ndarray], base: list[np.ndarray], found: list[np.ndarray], highest: float) -> Reading:
    tolerance = TOLERANCE + ENGINES * highest
    apart = distance(reference, found)
    chosen = choices(reference, found, tolerance)
    of_base = distance(reference, base).rms
    return Reading(apart.largest, apart.rms, of_base, apart.kl, tolerance, chosen.tokens, chosen.same, chosen.tied)


def _passes(reading: Reading, highest: float) -> bool:
    nearer = reading.rms < reading.base or reading.rms <= NOISE * highest
    return reading.largest_difference <= reading.tolerance and nearer and reading.same + reading.tied == reading.tokens


def _read_peft(model: Path, folder: Path, rows: Rows) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Logits of the base and with the adapter, as peft opens the folder."""
    from peft import PeftModel

    network, _ = load_transformers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for names that it is about to change
        warnings.filterwarnings("ignore", "Unexpected keyword arguments")  # mlx-lm's three keys
        warnings.filterwarnings("ignore", ".*rank_pattern")  # of parameters, which it looks for among modules
        tuned = PeftModel.from_pretrained(network, folder).eval()
        found = list(transformers_logits(tuned, rows))
        with tuned.disable_adapter():
            base = list(transformers_logits(tuned, rows))
    del network, tuned
    gc.collect()  # one model in memory at a time
    return base, found


def _read_mlx_lm(model: Path, folder: Path, rows: Rows) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """As mlx_lm.load with adapter_path, on a base whose config is read as transformers reads it."""
    from mlx_lm.tuner.utils import load_adapters

    from mlx_finetune.engines.mlx.load import load_model

    with on_cpu():
        network: Any = load_model(model, "float32")
        base = list(mlx_logits(network, rows))
        try:
            network = load_adapters(network, str(folder))
        except (KeyError, ValueError) as error:
            raise VerificationError(f"mlx-lm does not open the adapter: {' '.join(str(error).split())[:300]}") from error
        network.eval()
        found = list(mlx_logits(network, rows))
        del network
    gc.collect()
    return base, found


READERS: Mapping[str, Read] = {"peft": _read_peft, "mlx-lm": _read_mlx_lm}
