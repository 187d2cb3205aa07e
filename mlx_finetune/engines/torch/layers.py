"""The layers of a model of transformers': which a gradient goes through, and in which way they are computed."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mlx_finetune.config import RunConfig
from mlx_finetune.engines.adapter import LAYER
from mlx_finetune.engines.torch.adapt import Parameters, decoder_path, is_of_text


class Layers:
    """Those that read text."""

    def __init__(self, model: PreTrainedModel, parameters: Parameters) -> None:
        """`parameters`: what is trained."""
        self._model, self._parameters = model, parameters
        decoder = decoder_path(model)
        names = [name for name, _ in model.named_modules() if is_of_text(name, decoder)]
        found = [(name, match) for name in names if (match := LAYER.search(f"{name}."))]
        self._paths = {int(match[1]): name[: match.end() - 1] for name, match in found if match.end() > len(name)}

    def change(self, config: RunConfig) -> None:
        """Lets each `grad_checkpoint`-th layer that a gradient goes through be computed again; compiles layers."""
        paths = self._with_gradient()
        if config.torch_compile:
            for path in paths:
                layer = self._model.get_submodule(path)
                layer.forward = torch.compile(layer.forward, dynamic=True)  # inside what computes it again
        every = config.grad_checkpoint
        for path in paths[::every] if every else []:
            layer = self._model.get_submodule(path)
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def cut(self, device: str) -> None:
        """Over all processes, layer by layer."""
        from mlx_finetune.engines.torch.fsdp import cut

        each = [self._model.get_submodule(path) for path in self._paths.values()]
        cut(self._model, each, self._parameters.values(), device)

    def _with_gradient(self) -> list[str]:
        """Paths of the layers from the first on that has something to learn, or of all where embeddings do."""
        learning = [int(match[1]) for name in self._parameters if (match := LAYER.search(name))]
        embeddings = {id(parameter) for parameter in self._model.get_input_embeddings().parameters()}
        everything = any(id(parameter) in embeddings for parameter in self._parameters.values())
        first = 0 if everything else min(learning, default=len(self._paths))
        return [self._paths[number] for number in sorted(self._paths) if number >= first]
