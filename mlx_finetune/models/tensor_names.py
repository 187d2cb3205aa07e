"""What libraries and files call the same weight."""

import re
from collections.abc import Iterable, Mapping

# What transformers' class calls its modules, and what the files of models that see call them.
IN_FILES = (
    (r"^", ""),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.", "model.language_model."),
    (r"^", "language_model."),
)


def names_in_files(path: str) -> list[str]:
    """What the files of a Hugging Face checkpoint may call a module or a tensor of transformers' class."""
    return [re.sub(pattern, name, path) for pattern, name in IN_FILES]


def tensor_of(module: str, headers: Mapping[str, object]) -> str:
    """The weight of a module by its name in the files; the first way of calling it, where none of them is there."""
    return stored_name(f"{module}.weight", headers)


def stored_name(tensor: str, headers: Mapping[str, object]) -> str:
    """A tensor of transformers' class by its name in the files; the first way of calling it, where none of them is there."""
    names = names_in_files(tensor)
    return next((name for name in names if name in headers), names[0])


def transformers_name(path: str, names: Iterable[tuple[str, str]]) -> str:
    """The path of a module or an array of mlx-lm's class as transformers' class has it; `names`: see `mlx_config.names_of`."""
    for pattern, name in names:
        path = re.sub(pattern, name, path)
    return path
