"""mlx-finetune: your gptme conversations in, a tuned Hugging Face model out."""

from importlib.metadata import version

__version__ = version("mlx-finetune")
