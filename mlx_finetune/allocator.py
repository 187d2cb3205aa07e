"""How Linux gives numpy and torch their memory."""

import ctypes
import sys

MMAP_MAX, TRIM_THRESHOLD, ARENA_MAX = -4, -1, -8  # of mallopt(3)


def keep_blocks() -> None:
    """What a step frees the next one takes again: given back to the system it comes back page by page, a fifth of a step."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (ARENA_MAX, 1)):
            libc.mallopt(option, value)
