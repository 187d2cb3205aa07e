"""mlx-finetune: your gptme conversations in, a tuned Hugging Face model out."""

import os
from importlib.metadata import version

# OpenMP reads this when torch or the BLAS before MLX is loaded, so it is set before anything else is imported. Threads that spin
# while they wait made a step of either engine up to 100 times slower on cores that another program shares.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = version("mlx-finetune")
