"""What libraries say on stderr while they load a model, about matters that are ours and in which nothing is amiss."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# By logger: what the message begins with, or has in it. These kernels are not installed here; the plain ones compute the same.
REMARKS: Mapping[str, str] = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "transformers.integrations.hub_kernels": "is falling back to its reference PyTorch implementation",
}
RENAMED = "`rope_scaling` is deprecated"  # of config.json, where both libraries need it


class _Without(logging.Filter):
    """Drops the one remark and nothing else of its logger."""

    def __init__(self, remark: str) -> None:
        super().__init__()
        self.remark = remark

    def filter(self, record: logging.LogRecord) -> bool:
        return self.remark not in str(record.msg)


FILTERS = {name: _Without(remark) for name, remark in REMARKS.items()}


@contextmanager
def quietly() -> Iterator[None]:
    """While inside, no warning that `rope_scaling` has another name today; the remarks stay away later too, when it computes."""
    for name, one in FILTERS.items():
        logging.getLogger(name).addFilter(one)  # the same filter is not added twice
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", RENAMED, FutureWarning)
        yield
