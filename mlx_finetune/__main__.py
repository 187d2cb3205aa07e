"""`python -m mlx_finetune`, as launchers start it."""

from mlx_finetune.cli import main

if __name__ == "__main__":
    main()
