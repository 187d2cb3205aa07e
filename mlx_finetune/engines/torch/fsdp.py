"""FSDP2: the frozen weights of the layers cut over the processes of torchrun, and gathered layer by layer as they are used."""

from collections.abc import Iterable

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def cut(model: PreTrainedModel, layers: Iterable[torch.nn.Module], trained: Iterable[torch.nn.Parameter], device: str) -> None:
    """Moves a model that was loaded into the memory of the CPU to `device`, a layer at a time, and keeps a part of each there.

    What is trained stays whole on each process, and so do embeddings, head and norms outside the layers.
    """
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    whole = set(trained)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params={p for p in layer.parameters() if p in whole})
    backbone = model.get_submodule(model.base_model_prefix)  # one root for all layers: they share streams, and gather ahead
    fully_shard(backbone, mesh=mesh, ignored_params={p for p in backbone.parameters() if not isinstance(p, DTensor)})
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)
