"""The next batches are read while the engine is at work on those before them."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import Batch
from mlx_finetune.data.dataset import Dataset


class Ahead:
    """Batches of a data set, step by step, by one thread beside this one."""

    def __init__(self, pool: ThreadPoolExecutor, dataset: Dataset, config: RunConfig, steps: int) -> None:
        self._pool, self._dataset, self._config, self._steps = pool, dataset, config, steps
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def batches_at(self, step: int) -> list[Batch]:
        """Those of `Dataset.batches_at`; those of the step behind it are begun."""
        begun = self._next[1] if self._next and self._next[0] == step else self._begin(step)
        self._next = (step + 1, self._begin(step + 1)) if step + 1 < self._steps else None
        return begun.result()

    def _begin(self, step: int) -> Future[list[Batch]]:
        return self._pool.submit(self._dataset.batches_at, step, self._config)


@contextmanager
def ahead(dataset: Dataset, config: RunConfig, steps: int) -> Iterator[Ahead]:
    """Of `steps` steps in all; what was begun and is not wanted is given up at the end."""
    with ThreadPoolExecutor(1, "batches") as pool:
        try:
            yield Ahead(pool, dataset, config, steps)
        finally:
            pool.shutdown(cancel_futures=True)
