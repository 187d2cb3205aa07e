"""The torch engine. Torch asks once, at its first tensor, whether large blocks of memory should be huge pages: they should."""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
