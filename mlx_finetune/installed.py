"""Which versions of this program and of what it runs on are installed."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("mlx-finetune", "mlx", "mlx-lm", "torch", "transformers")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """By name of the package, of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
