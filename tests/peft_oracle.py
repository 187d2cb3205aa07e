"""What transformers and peft make of a batch and an adapter: the reference, in which nothing is ours."""

from typing import Any

import numpy as np

from mlx_finetune.data.batches import Batch


def loss_sum(network: Any, batch: Batch) -> Any:
    """Sum of weight times cross entropy (nats), a torch number with a gradient, in float64 from the logits on."""
    import torch

    logits = network(torch.from_numpy(batch.inputs).long()).logits.double()
    chosen = torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(batch.targets).long()[..., None])[..., 0]
    return -(chosen * torch.from_numpy(batch.weights)).sum()


def put(state: dict[str, np.ndarray], network: Any) -> None:
    """The adapter of an engine's state into a network of peft."""
    import torch

    named = dict(network.named_parameters())
    with torch.no_grad():
        for name, array in state.items():
            if name.startswith("adapter/"):
                where = "base_model.model." + name.removeprefix("adapter/").removesuffix(".weight")
                named[f"{where}.default.weight"].copy_(torch.from_numpy(array))


def loss_and_norm(network: Any, batch: Batch) -> tuple[float, float]:
    """Mean loss of a learned token, and the length of the gradient of all that is trained."""
    import torch

    loss = loss_sum(network, batch) / batch.learned
    loss.backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return loss.item(), torch.stack([gradient.norm() for gradient in gradients]).norm().item()


def greedy(network: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens one after the other, each from the whole text anew."""
    import torch

    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(network(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
