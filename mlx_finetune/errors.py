"""The one error of a user: what is wrong and where, and what to do next."""

import re

SHORTAGE = re.compile(r"out of memory|insufficient memory|allocate|bad_alloc|alloc_failed", re.IGNORECASE)
# What code of others raises where it computes with a setting that it did not look at; huggingface_hub has one more of its own.
REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class UserError(Exception):
    """A mistake that the person can mend. The command line prints it as one line plus one line of hint, exit status 2."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def no_memory(error: BaseException) -> bool:
    """Whether this is how MLX, torch, numpy or Python say that there is no memory: no fault of what was being read."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and SHORTAGE.search(str(error)) is not None)
