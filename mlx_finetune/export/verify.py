"""Proof that the fused folder is the base with what was trained: both are run, and their logits compared.

Base + checkpoint comes from the checkpoint folder, not from the fused file: an adapter is opened by peft where torch is
installed, else added to the weights that MLX loaded; trained weights are put into the loaded base. The engine that trained is
asked too, where it is installed, and what must not change is compared byte for byte. Where memory does not suffice for that,
nothing is run, and every number that changed is computed again instead (verify_weights.py).
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.export.backends import in_transformers
from mlx_finetune.export.card import write_card
from mlx_finetune.export.changes import read_changes
from mlx_finetune.export.distance import (
    ENGINES,
    TOLERANCE,
    Distance,
    Distances,
    Measured,
    VerificationError,
    choices,
    distance,
    largest,
)
from mlx_finetune.export.facts import Facts
from mlx_finetune.export.folder_checks import FolderChecks, check_folder
from mlx_finetune.export.from_mlx import is_mlx_adapter
from mlx_finetune.export.fuse import Fused, Progress, fuse_into, write_template
from mlx_finetune.export.in_engine import exact_length, logits_of, trained_with
from mlx_finetune.export.memory import running, shortage
from mlx_finetune.export.mlx_backend import in_mlx
from mlx_finetune.export.packed_logits import fused_logits, packed_logits, trained_logits
from mlx_finetune.export.probes import ANSWER, PROBE_TEXTS, bounded, spread, tokens_of
from mlx_finetune.export.report import write_report
from mlx_finetune.export.rows import EMBEDDINGS, Change
from mlx_finetune.export.verified import Backend, InEngine, Verified
from mlx_finetune.export.verify_weights import verify_weights
from mlx_finetune.files import atomic_folder
from mlx_finetune.terminal import waiting
from mlx_finetune.training.manifest import made_from

__all__ = ["PROBE_TEXTS", "InEngine", "VerificationError", "Verified", "fuse_and_verify", "verify"]

NOISE = 1e-5  # of the largest logit: below this float32 cannot say which of two models is nearer
NEAR = 1e-2  # of the way from the base
TIES = 0.1  # of the rounding's own effect: two float32 sums now and then round to either side of a tie


def fuse_and_verify(
    model: Path,
    checkpoint: Path,
    out: Path,
    texts: Sequence[str],
    progress: Progress | None = None,
    template: str = "",
    facts: Facts | None = None,
    packed: Path | None = None,
    from_packed: bool = False,
    changes: Mapping[str, Change] | None = None,
    by_weights: bool | None = None,
) -> tuple[Fused, Verified]:
    """`fuse`, then `verify`; `out` appears only if the fused model passed, with verification.json in it.

    `template`: the chat template that was trained. `facts`: of the run, for a model card above the base's own. `packed`: the
    quantised weights that were trained on, where `model` is not; `from_packed`: they are in the fused model, which `changes` does.
    `by_weights`: nothing is run, and every number is computed again; None: where the memory that is free now does not suffice.

    Raises:
        UserError: as `fuse`; or rounding outweighs what was trained, so that nothing of it could be handed back; or memory ran
            out while the models were run.
        VerificationError: the fused model is not base + what was trained; nothing is left.
    """
    short = shortage(model) if by_weights is None else None
    with atomic_folder(out) as folder:
        changes = read_changes(model, checkpoint) if changes is None else changes
        fused = fuse_into(model, checkpoint, folder, progress, changes)
        if template:
            write_template(folder, template)
        doing = waiting("comparing it with the model as it was trained")
        if by_weights or short:
            why = f"its weights take {short}" if short else "--by-weights"
            with doing:
                verified = _by_weights(model, checkpoint, folder, template, changes, from_packed, why)
        elif packed and from_packed:
            with doing, running(model):
                verified = verify_packed(model, packed, checkpoint, folder, texts, template, changes)
        else:
            with doing, running(model):
                verified = verify(model, checkpoint, folder, texts, template, packed, changes)
        if verified.outweighed:
            what = "it changes the weights by less than their stored precision rounds away"
            raise UserError(f"{checkpoint}: {what}; {out} was not written", hint="train longer, or with a higher learning_rate")
        if not verified.passed:
            raise VerificationError(f"{out} was not written: the fused model is not base + what was trained: {verified}")
        report = write_report(folder, asdict(verified), made_from(checkpoint))
        if facts is not None:
            write_card(folder, facts, report)
    return fused, verified


def _by_weights(
    model: Path, checkpoint: Path, fused: Path, template: str, changes: Mapping[str, Change], from_packed: bool, why: str
) -> Verified:
    """Passes where every changed number is base + checkpoint, rounded once, and nothing else changed."""
    found = verify_weights(model, checkpoint, fused, changes, independent=not from_packed)
    folder = check_folder(model, fused, changes, template)
    passed = not (found.problems or found.missing or found.unexpected or folder.problems)
    return Verified(
        "weights", found.missing, found.unexpected, None, None, None, None, passed,
        folder=asdict(folder), weights=asdict(found), not_run=why,
    )  # fmt: skip


def verify(
    model: Path,
    checkpoint: Path,
    fused: Path,
    texts: Sequence[str],
    template: str = "",
    packed: Path | None = None,
    changes: Mapping[str, Change] | None = None,
) -> Verified:
    """Compares the folder `fused` with `model` + what `checkpoint` trained, in float32, one model at a time.

    Runs in transformers and peft where torch and peft are installed, else in MLX; the result says which. Passes when no
    key is missing or unexpected, the largest difference is within the tolerance, the fused model differs from the tuned one
    by no more than the rounding of the stored weights, and is nearer to it than the base is; when its greedy answers are the
    same but for ties; when the engine that trained says the same; and when nothing else changed (`check_folder`).
    Of each text the first 256 tokens are compared, and 24 that the tuned model answers.
    """
    changes = read_changes(model, checkpoint) if changes is None else changes
    rows = (change.location.shape[0] for name, change in changes.items() if f".{name}".endswith(EMBEDDINGS))
    tokens, others = bounded(model, tokens_of(model, texts), spread(rows))
    by_peft = find_spec("torch") and find_spec("peft") and not is_mlx_adapter(checkpoint)
    backend: Backend = "transformers" if by_peft else "mlx"
    measure = {"transformers": in_transformers, "mlx": in_mlx}[backend]
    stored = {name: change.location.dtype for name, change in changes.items() if change.location.dtype != "F32"}
    answers = [ANSWER] * len(tokens) + [0] * len(others)
    measured = measure(model, checkpoint, fused, [*tokens, *others], stored, answers)
    found = _compare(backend, measured, answers, bool(stored), check_folder(model, fused, changes, template))
    found = _with_engine(found, model, checkpoint, measured, answers)
    trained = trained_logits(packed, checkpoint, measured.rows) if packed else None
    return replace(found, trained_on=asdict(distance(trained, measured.found))) if trained else found


def verify_packed(
    model: Path, packed: Path, checkpoint: Path, fused: Path, texts: Sequence[str], template: str, changes: Mapping[str, Change]
) -> Verified:
    """Compares the folder `fused` with the model that was trained, on the quantised weights `packed`, in the engine that did.

    Passes where it is within 1e-3 and 3e-4 of the largest logit of it; where the weights are stored in fewer bits than float32, ten
    times nearer to it (KL) than the quantised base is, as unpacked numbers have more digits than BF16 keeps.

    Raises:
        UserError: the engine that trained is not known or not installed.
    """
    backend: Backend = "transformers" if find_spec("torch") else "mlx"
    rows = tokens_of(model, texts)
    trained = trained_logits(packed, checkpoint, rows)
    if trained is None:
        raise UserError(f"{checkpoint}: the engine that trained it is not here", hint="fuse it where it was trained")
    base = distance(trained, packed_logits(packed, rows))
    found, missing, unexpected = fused_logits(model, fused, rows, backend)
    apart, size = distance(trained, found), largest(trained)
    is_rounded = any(change.location.dtype != "F32" for change in changes.values())
    tolerance = TOLERANCE + ENGINES * size
    close = apart.kl <= TIES * base.kl if is_rounded else _alike(apart, tolerance, base)
    checks = check_folder(model, fused, changes, template)
    passed = close and not (missing or unexpected or checks.problems)
    return Verified(
        backend, missing, unexpected, apart.largest, size, apart.kl, tolerance, passed,
        positions=sum(map(len, rows)), folder=asdict(checks), trained_on=asdict(apart),
    )  # fmt: skip


def _compare(backend: Backend, measured: Measured, answers: Sequence[int], is_rounded: bool, folder: FolderChecks) -> Verified:
    """A fused model within 1e-3 of the rounded weights lies within 1e-3 + the rounding of the tuned model: the tolerance."""
    found = measured.distances
    tolerance = TOLERANCE + (found.rounded.largest if is_rounded else 0.0)
    only_rounded = found.fused_to_rounded.rms <= TIES * found.rounded.rms + NOISE * found.largest_logit
    nearer = _nearer(found, found.fused.rms)
    chosen = choices(*_answered(measured, measured.found, answers), tolerance)
    right = not (found.missing or found.unexpected or folder.problems) and found.fused.largest <= tolerance and only_rounded
    right = right and not chosen.different
    return Verified(
        backend=backend,
        missing=found.missing,
        unexpected=found.unexpected,
        largest_difference=found.fused.largest,
        largest_logit=found.largest_logit,
        kl=found.fused.kl,
        tolerance=tolerance,
        passed=right and nearer,
        outweighed=right and not nearer and found.rounded.rms >= found.base.rms,
        positions=sum(map(len, measured.rows)) - sum(answers),
        choices=asdict(chosen),
        folder=asdict(folder),
    )


def _alike(apart: Distance, tolerance: float, base: Distance) -> bool:
    """Whether logits of two libraries are the same: within the tolerance, or a hundred times nearer than the base's are.

    The latter for recurrences, whose sums in another order some networks make more of.
    """
    return apart.largest <= tolerance or (apart.rms <= NEAR * base.rms and apart.kl <= NEAR * base.kl)


def _nearer(found: Distances, rms: float) -> bool:
    """Whether logits so far from the tuned model's are nearer to them than the base's are, as far as float32 can say."""
    return rms < found.base.rms or rms <= NOISE * found.largest_logit


def _answered(measured: Measured, other: list[np.ndarray], answers: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of both models the logits before each token of an answer; rows that are not whole in `other` are left out."""
    whole = [i for i, count in enumerate(answers) if count and len(other[i]) == len(measured.reference[i])]
    reference, found = ([logits[i][-answers[i] - 1 : -1] for i in whole] for logits in (measured.reference, other))
    return reference, found


def _with_engine(found: Verified, model: Path, checkpoint: Path, measured: Measured, answers: Sequence[int]) -> Verified:
    """`found`, and what the engine that trained computes; as it is where that engine is not installed or not known."""
    engine = trained_with(checkpoint)
    if engine is None or not found.passed:
        return found
    gc.collect()  # one model in memory at a time
    size, own = measured.distances.largest_logit, found.tolerance
    assert own is not None
    most = exact_length(model, engine)
    logits = list(logits_of(model, checkpoint, engine, [row[:most] for row in measured.rows]))
    reference = [rows[:most] for rows in measured.reference]
    tolerance = TOLERANCE + ENGINES * size
    apart = distance(reference, logits)
    # the tolerance of the fused model was measured on the texts, without the answers
    texts = [len(row) - count for row, count in zip(measured.rows, answers, strict=True)]
    fused = distance(*([rows[: min(n, most or n)] for rows, n in zip(of, texts, strict=True)] for of in (logits, measured.found)))
    base = measured.distances.base
    chosen = choices(*_answered(measured, logits, answers), max(tolerance, apart.largest))
    passed = _alike(apart, tolerance, base) and _alike(fused, tolerance + own, base) and not chosen.different
    passed = passed and (_nearer(measured.distances, apart.rms) or apart.rms <= ENGINES * TIES * size)
    said = InEngine(engine, apart.largest, fused.largest, apart.kl, tolerance, chosen, passed)
    return replace(found, engine=asdict(said), passed=passed)
