"""Proof that the fused folder is the base with what was trained: both are run, and their logits compared.

Base + checkpoint comes from the checkpoint folder, not from the fused file: an adapter is opened by peft where torch is
installed, else added to the weights that MLX loaded; trained weights are put into the loaded base.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.export.backends import in_mlx, in_transformers
from mlx_finetune.export.changes import EMBEDDINGS, read_changes
from mlx_finetune.export.distance import Distances, VerificationError
from mlx_finetune.export.fuse import Fused, Progress, fuse_into, write_template
from mlx_finetune.export.rows import Change
from mlx_finetune.files import atomic_folder

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


@dataclass(frozen=True)
class Verified:
    """What the comparison of the fused model with the tuned one (base + checkpoint) found, over every position of the texts.

    missing, unexpected: tensors that the fused folder lacks or has too many, those left out that the base has alike.
    largest_difference, largest_logit: absolute, of single logits; largest_logit is of the tuned model.
    kl: mean over the positions of KL(tuned || fused), nats.
    tolerance: 1e-3 for float32; for BF16 and F16 besides what rounding the same weights costs, measured (see `_compare`).
    outweighed: it is what it has to be, but rounding leaves the trained weights no nearer to the tuned model than the base is.
    """

    backend: Backend
    missing: list[str]
    unexpected: list[str]
    largest_difference: float
    largest_logit: float
    kl: float
    tolerance: float
    passed: bool
    outweighed: bool = False


def fuse_and_verify(
    model: Path, checkpoint: Path, out: Path, texts: Sequence[str], progress: Progress | None = None, template: str = ""
) -> tuple[Fused, Verified]:
    """`fuse`, then `verify`; `out` appears only if the fused model passed. `template`: the chat template that was trained.

    Raises:
        UserError: as `fuse`; or rounding outweighs what was trained, so that nothing of it could be handed back.
        VerificationError: the fused model is not base + what was trained; nothing is left.
    """
    with atomic_folder(out) as folder:
        fused = fuse_into(model, checkpoint, folder, progress)
        if template:
            write_template(folder, template)
        verified = verify(model, checkpoint, folder, texts)
        if verified.outweighed:
            what = "it changes the weights by less than their stored precision rounds away"
            raise UserError(f"{checkpoint}: {what}; {out} was not written", hint="train longer, or with a higher learning_rate")
        if not verified.passed:
            raise VerificationError(f"{out} was not written: the fused model is not base + what was trained: {verified}")
    return fused, verified


def verify(model: Path, checkpoint: Path, fused: Path, texts: Sequence[str]) -> Verified:
    """Compares the folder `fused` with `model` + what `checkpoint` trained, in float32, one model at a time.

    Runs in transformers and peft where torch and peft are installed, else in MLX; the result says which. Passes when no
    key is missing or unexpected, the largest difference is within the tolerance, the fused model differs from the tuned one
    by no more than the rounding of the stored weights, and is nearer to it than the base is.
    Of each text the first 256 tokens are compared.
    """
    changes = read_changes(model, checkpoint)
    tokens = [*_tokens(model, texts), *_spread(changes)]
    backend: Backend = "transformers" if find_spec("torch") and find_spec("peft") else "mlx"
    measure = {"transformers": in_transformers, "mlx": in_mlx}[backend]
    stored = {name: change.location.dtype for name, change in changes.items() if change.location.dtype != "F32"}
    return _compare(backend, measure(model, checkpoint, fused, tokens, stored), bool(stored))


def _compare(backend: Backend, found: Distances, is_rounded: bool) -> Verified:
    """A fused model within 1e-3 of the rounded weights lies within 1e-3 + the rounding of the tuned model: the tolerance."""
    tolerance = TOLERANCE + (found.rounded.largest if is_rounded else 0.0)
    only_rounded = found.fused_to_rounded.rms <= TIES * found.rounded.rms + NOISE * found.largest_logit
    nearer = found.fused.rms < found.base.rms or found.fused.rms <= NOISE * found.largest_logit
    right = not (found.missing or found.unexpected) and found.fused.largest <= tolerance and only_rounded
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
    )


def _tokens(model: Path, texts: Sequence[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    tokens = [list(tokenizer(text)["input_ids"])[:LONGEST] for text in texts]
    assert any(tokens), "nothing to compare"
    return [row for row in tokens if row]


def _spread(changes: Mapping[str, Change]) -> list[list[int]]:
    """A row of tokens from the whole vocabulary where embeddings change: a wrong row of them shows only when it is read."""
    ends = (f"{EMBEDDINGS}.weight", "wte.weight")
    rows = [change.location.shape[0] for name, change in changes.items() if name.endswith(ends)]
    return [np.linspace(0, count - 1, LONGEST, dtype=int).tolist() for count in rows]
