"""`mlx-finetune`, and `python -m mlx_finetune` as launchers start it: a Ctrl-C is heard while the libraries are still loaded."""

import sys


def main(arguments: list[str] | None = None) -> None:
    """Loads the command line and runs it; see `cli.main`."""
    try:
        from mlx_finetune.cli import main as command_line
    except KeyboardInterrupt:
        print("interrupted: nothing was begun", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, ImportError, OSError) as error:
        from mlx_finetune.errors import LESS, no_memory

        if not no_memory(error):
            raise
        print(f"error: there is no memory to start: {error.__cause__ or error}\nhint: {LESS}", file=sys.stderr)
        sys.exit(2)
    command_line(arguments)


if __name__ == "__main__":
    main()
