"""Early stopping: a run ends where its held-out loss has not become lower for a while. A pure function of what was measured."""

import math
from collections.abc import Iterable


def out_of_patience(measured: Iterable[tuple[int, float]], patience: int) -> str | None:
    """Why a run is to stop, in words, where its last `patience` held-out losses are not below the lowest before them; else None.

    `measured`: step and loss of each, in order, the base model left out as for `best`. `patience` 0: never.
    """
    best_step, best, waited = 0, math.inf, 0
    for step, loss in measured:
        best_step, best, waited = (step, loss, 0) if loss < best else (best_step, best, waited + 1)
    if not patience or waited < patience:
        return None
    times = "once" if waited == 1 else f"{waited} times"
    return f"the held-out loss was measured {times} since its lowest, {best:.4f} at step {best_step}, and was not lower"
