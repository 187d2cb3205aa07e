"""FSDP2: the frozen weights of the layers cut over the processes of torchrun, and gathered layer by layer as they are used."""

from collections.abc import Iterable

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel


def cut(model: PreTrainedModel, trained: Iterable[torch.nn.Parameter], device: str) -> None:
    """What is trained stays whole on each process, and so do embeddings, head and final norm: their gradients are summed by us."""
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    whole = set(trained)
    layers = model.get_submodule(model.base_model_prefix).get_submodule("layers")
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params={p for p in layer.parameters() if p in whole})
