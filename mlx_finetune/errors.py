"""The one error of a user: what is wrong and where, and what to do next."""

import errno
import re

LONGEST = 480  # characters of a message
OF_LOADER = re.compile(r"map segment(?!.*not permitted)|cannot allocate memory(?! in static TLS)", re.IGNORECASE)
SHORTAGE = re.compile(r"out of memory|insufficient memory|allocate|bad_alloc|alloc_failed", re.IGNORECASE)
LESS = "close other programs, or choose a smaller model: mlx-finetune plan says what a run needs"
# What code of others raises where it computes with a setting that it did not look at; huggingface_hub has one more of its own.
REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class UserError(Exception):
    """A mistake that the person can mend. The command line prints it as one line plus one line of hint, exit status 2."""

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = _cut(_one_line(message))
        super().__init__(self.message)
        self.hint = _one_line(hint)  # whole, for it may be typed


def _one_line(text: str) -> str:
    """Whatever names and values of strangers stand in it, nothing that moves a cursor."""
    return text if text.isprintable() else "".join(sign if sign.isprintable() else " " for sign in text)


def _cut(text: str) -> str:
    """Not too long to be read: the place in front and the reason at the end stay."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 180]} ... {text[-175:]}"


def no_memory(error: BaseException) -> bool:
    """Whether this is how MLX, torch, numpy, Python or the loader of libraries say that there is no memory."""
    if isinstance(error, OSError) and error.errno is not None:  # ctypes gives a library's own words alone
        return error.errno == errno.ENOMEM
    if isinstance(error, ImportError | OSError):
        return OF_LOADER.search(str(error.__cause__ or error)) is not None
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and SHORTAGE.search(str(error)) is not None)
