"""Proof that a converted folder computes what the original does: both are run in float32, one model in memory at a time.

Not quantised: MLX and transformers, each with the new folder, against the reference with the same weights (rounded where the
dtype is another). Quantised: MLX with the original weights against the reference, so that the architecture is right; each stored
weight against the original's, so that they are that model's; then the packed model against the same with each weight unpacked
before it is multiplied, so that they are computed with. What quantisation costs, and whether mlx-lm unaided reads the folder
alike, is measured besides and refuses nothing.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.export.distance import VerificationError, distance, largest
from mlx_finetune.export.stored_logits import Probe, named, probe_tokens, transformers_logits

Tokens = Sequence[Sequence[int]]
Logits = Sequence[np.ndarray]  # [T, V] of each text

TOLERANCE = 1e-3  # of the largest logit: float32 sums in another order stay below 1e-4, a wrong setting gives 1e-1
UNAIDED = 1e-4  # mlx-lm's known defects of forward passes lie between 2e-4 and 7e-4
PREFIX = 24  # tokens of two rows that are multiplied with packed weights, which is slow on a CPU
ORIGINAL_IN_MLX, MADE_IN_MLX, MADE_IN_TRANSFORMERS, PACKED = "original_in_mlx", "made_in_mlx", "made_in_transformers", "packed"


@dataclass(frozen=True)
class Verified:
    """`differences`: the largest difference of a logit from what it must equal, over the largest logit, by what was compared.

    weights: of a packed model, the largest distance of a weight from the original's, over what its quantisation may take (1).
    mlx_lm: as `differences`, of `mlx_lm.load` unaided; None where it cannot load the folder.
    relative_error, kl: of the converted model to the original on the texts alone (largest difference over largest logit; mean KL
    in nats); None where there was no reference.
    """

    reference: str | None
    positions: int
    differences: dict[str, float]
    weights: float | None
    mlx_lm: float | None
    tolerance: float
    relative_error: float | None
    kl: float | None

    @property
    def passed(self) -> bool:
        """NaN is no equality."""
        return all(value <= self.tolerance for value in self.differences.values()) and (self.weights is None or self.weights <= 1)

    @property
    def read_by_mlx_lm(self) -> bool:
        """Whether `mlx_lm.load` computes the same from config.json alone."""
        return self.mlx_lm is not None and self.mlx_lm <= UNAIDED


@dataclass(frozen=True)
class Compared:
    """original: as the person has it; model: the same as a Hugging Face folder; made: what was written; dtype: that it was cast to.

    whole: whether the original weights fit into memory in float32.
    """

    original: Path
    model: Path
    made: Path
    is_packed: bool
    dtype: str | None
    whole: bool


def verify_converted(what: Compared, probe: Probe | None) -> tuple[Verified, Probe | None]:
    """The comparison, and the reference's logits. `probe`: stored logits of the original, else transformers or MLX computes them.

    Raises:
        UserError: MLX computes something else than the reference, or something cannot be loaded.
        VerificationError: what was written is not what was to be written.
    """
    probe = probe or (_reference(what) if what.whole else None)
    tokens = probe.tokens if probe else probe_tokens(what.model)
    verified = _packed(what, probe, tokens) if what.is_packed else _plain(what, probe, tokens)
    if not verified.passed:
        _refuse(what, verified)
    return verified, probe


def _reference(what: Compared) -> Probe:
    from mlx_finetune.engines.mlx.probe import logits

    tokens = probe_tokens(what.model)
    if has_transformers():
        return Probe(tokens, transformers_logits(what.original, tokens), named("transformers"))
    return Probe(tokens, logits(what.model, tokens), named("mlx"))


def has_transformers() -> bool:
    """Whether models of transformers can be run here."""
    return importlib.util.find_spec("torch") is not None


def _plain(what: Compared, probe: Probe | None, tokens: Tokens) -> Verified:
    from mlx_finetune.engines.mlx.probe import logits, plain_logits

    assert probe is not None, "the weights of an unquantised model are run"
    by_transformers = probe.reference == named("transformers")
    expected, differences = probe.logits, {}
    if what.dtype and by_transformers:
        expected = transformers_logits(what.original, tokens, what.dtype)
    elif what.dtype:
        differences[ORIGINAL_IN_MLX] = _apart(probe.logits, logits(what.model, tokens))
        expected = logits(what.model, tokens, what.dtype)
    found = logits(what.made, tokens)
    differences[MADE_IN_MLX] = _apart(expected, found)
    if by_transformers:
        differences[MADE_IN_TRANSFORMERS] = _apart(expected, transformers_logits(what.made, tokens))
    return _verified(probe, differences, found, found, plain_logits(what.made, tokens))


def _packed(what: Compared, probe: Probe | None, tokens: Tokens) -> Verified:
    from mlx_finetune.engines.mlx.probe import logits, plain_logits
    from mlx_finetune.engines.mlx.stored import farthest_weight

    weights, differences = farthest_weight(what.model, what.made), {}
    if probe and what.whole and probe.reference != named("mlx"):
        differences[ORIGINAL_IN_MLX] = _apart(probe.logits, logits(what.model, tokens))
    found = logits(what.made, tokens, unpacked=True)
    ends = (0, -1)
    short = [tokens[i][:PREFIX] for i in ends]
    packed = logits(what.made, short)
    differences[PACKED] = _apart([found[i][:PREFIX] for i in ends], packed)
    return replace(_verified(probe, differences, found, packed, plain_logits(what.made, short)), weights=weights)


def _verified(probe: Probe | None, differences: dict[str, float], found: Logits, same: Logits, plain: Logits | None) -> Verified:
    """`plain` is what mlx-lm unaided makes of the rows of `same`."""
    by_mlx_lm = _apart(same, plain) if plain else None
    positions = sum(map(len, found))
    if probe is None:
        return Verified(None, positions, differences, None, by_mlx_lm, TOLERANCE, None, None)
    texts = slice(None, -1) if len(found) > 1 else slice(None)
    cost = distance(probe.logits[texts], found[texts])
    error = cost.largest / largest(probe.logits[texts])
    return Verified(probe.reference, positions, differences, None, by_mlx_lm, TOLERANCE, error, cost.kl)


def _apart(expected: Logits, found: Logits) -> float:
    return distance(expected, found).largest / largest(expected)


def _refuse(what: Compared, verified: Verified) -> None:
    wrong = {name: value for name, value in verified.differences.items() if not value <= verified.tolerance}
    said = ", ".join(f"{value:.1%} of the largest ({name})" for name, value in wrong.items())
    if wrong.keys() & {ORIGINAL_IN_MLX, MADE_IN_MLX}:
        raise UserError(
            f"{what.model}: MLX computes something else than {verified.reference}: logits differ by {said}; nothing was written",
            hint="config.json has a setting that mlx-lm does not read: train it with --engine torch",
        )
    said = said or f"weights lie {verified.weights:.1f} times as far from the original's as they may"
    raise VerificationError(f"nothing was written: the new folder is not the original's: {said}: {verified}")
