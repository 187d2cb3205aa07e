"""Changes of parameters as mlx-lm has them, carried back to the tensors of the checkpoint that they are made of."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlx_finetune.errors import UserError


class Pulled:
    """Those of a group of parameters, once, kept until each tensor of it is taken; one that is stored twice is taken twice.

    `sources`: of engines/mlx/pullback.py. `array_of`: what is carried back of a parameter, float32 in its own shape.
    """

    def __init__(self, group: Sequence[str], sources: Any, array_of: Callable[[str], np.ndarray], hint: str) -> None:
        self.group, self.sources = group, sources
        self._array_of, self._hint = array_of, hint
        self._left: dict[str, np.ndarray] = {}

    @property
    def tensors(self) -> list[str]:
        """Of the checkpoint, of which the group is made."""
        return sorted({tensor for parameter in self.group for tensor in self.sources.of[parameter]})

    def take(self, tensor: str) -> np.ndarray:
        """Float32 [rows, all else].

        Raises:
            UserError: a parameter has no place in the checkpoint.
        """
        from mlx_finetune.engines.mlx.pullback import Unmapped

        if tensor not in self._left:
            import mlx.core as mx

            try:
                pulled = self.sources.pull(self.group, [mx.array(self._array_of(one)) for one in self.group])
            except Unmapped as error:
                raise UserError(f"{error}: it has no place in the checkpoint", hint=self._hint) from error
            self._left = {name: np.array(array) for name, array in pulled.items()}
        array = self._left.pop(tensor)
        return array.reshape(len(array) if array.ndim else 1, -1)
