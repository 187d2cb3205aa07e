"""LoRA on the experts of a mixture: x W^T + scale * (x A^T) B^T of each expert for the tokens that are sent to it."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from mlx_finetune.config import RunConfig
from mlx_finetune.engines.adapter import Target, scale_of
from mlx_finetune.engines.experts import DOWN, EXPERTS, GATE_UP, PROJECTIONS

BYTES = 16  # rows that torch's grouped product takes are so long, or a multiple
CAPABLE = (8, 0)  # of CUDA, for that product
UNLIKE = ("is_transposed", "has_bias", "has_post_expert_norm")  # what the experts of some architectures have
LIKE = ("has_gate", "is_concatenated")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # not in fewer bits, with scales beside them


class Sorted:
    """How many of the rows that are sorted by their expert are whose."""

    def __init__(self, chosen: torch.Tensor, count: int) -> None:
        """`chosen`: the expert of each row, of so many."""
        self._counts = torch.bincount(chosen, minlength=count)
        self._ends = self._counts.cumsum(0).to(torch.int32)

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[S, in], [experts, out, in] -> [S, out]: of each row with the matrix of its expert."""
        return self.at_once(x, weight) if _has_kernel(x, weight) else self.one_by_one(x, weight)

    def at_once(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The product by torch's kernel."""
        product: torch.Tensor = F.grouped_mm(x, weight.transpose(1, 2), offs=self._ends)
        return product

    def one_by_one(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The product, an expert after the other."""
        parts = zip(x.split(self._counts.tolist()), weight.unbind(), strict=True)
        return torch.cat([rows @ matrix.T for rows, matrix in parts if len(rows)])


class ExpertMatrices(torch.nn.Module):
    """scale * (x A^T) B^T of one projection, A [experts, rank, in] and B [experts, out, rank] float32.

    Dropout drops anew of each row: of a token for each expert that it is sent to.
    """

    def __init__(self, target: Target, rank: int, scale: float, dropout: float, device: torch.device) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.lora_A = torch.nn.Parameter(torch.zeros(target.count, rank, target.columns, device=device))
        self.lora_B = torch.nn.Parameter(torch.zeros(target.count, target.rows, rank, device=device))

    def forward(self, x: torch.Tensor, rows: Sorted) -> torch.Tensor:
        """[S, in] -> [S, out]."""
        low = rows.product(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        return rows.product(self.scale * low, self.lora_B.to(x.dtype))


class LoRAExperts(torch.nn.Module):
    """Stands in for the experts of transformers, whose weights stay as they are: W + scale * B A is never written out."""

    def __init__(self, base: torch.nn.Module, adapters: Mapping[str, ExpertMatrices]) -> None:
        """`adapters`: by projection; gate and up both or neither."""
        super().__init__()
        self.base, self.adapters = base, torch.nn.ModuleDict(adapters)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """[T, D], and of each token the experts [T, k] and what their answers count [T, k] -> [T, D]."""
        base: Any = self.base
        order = top_k_index.reshape(-1).argsort(stable=True)
        rows = Sorted(top_k_index.reshape(-1), len(base.down_proj))
        x = hidden_states[order // top_k_index.shape[1]]
        both = rows.product(x, base.gate_up_proj)
        if "gate_proj" in self.adapters:
            both = both + torch.cat([self.adapters[name](x, rows) for name in ("gate_proj", "up_proj")], 1)
        inner = base._apply_gate(both)
        output = rows.product(inner, base.down_proj)
        if DOWN in self.adapters:
            output = output + self.adapters[DOWN](inner, rows)
        weighted = output * top_k_weights.reshape(-1)[order, None]
        unsorted = weighted[order.argsort()].reshape(*top_k_index.shape, -1)
        return unsorted.sum(1).to(hidden_states.dtype)  # in one order always, which adding by index has not on CUDA


def experts_of(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Experts that can be adapted, by path: gate and up are one parameter, above each other, without biases."""
    for path, module in model.named_modules():
        shapes = [getattr(getattr(module, name, None), "shape", ()) for name in (GATE_UP, DOWN)]
        like = all(getattr(module, name, False) for name in LIKE) and not any(getattr(module, name, True) for name in UNLIKE)
        like = like and path.rpartition(".")[2] == EXPERTS and all(len(shape) == 3 for shape in shapes)
        if like and module.gate_up_proj.dtype in DTYPES:
            yield path, module


def expert_targets(model: torch.nn.Module) -> dict[str, Target]:
    """Each projection of each layer's experts, by path."""
    targets = {}
    for path, module in experts_of(model):
        count, width, inner = module.down_proj.shape
        for name in PROJECTIONS:
            shape = (width, inner) if name == DOWN else (inner, width)
            targets[f"{path}.{name}"] = Target(*shape, "experts", count)
    return targets


def adapt_experts(model: torch.nn.Module, targets: Mapping[str, Target], config: RunConfig) -> dict[str, torch.nn.Module]:
    """Puts adapters beside the experts that are among `targets`; the adapters, by path."""
    adapted: dict[str, torch.nn.Module] = {}
    for path, module in list(experts_of(model)):
        own = {name: targets[f"{path}.{name}"] for name in PROJECTIONS if f"{path}.{name}" in targets}
        how = config.rank, scale_of(config), config.dropout, module.down_proj.device
        adapters = {name: ExpertMatrices(target, *how) for name, target in own.items()}
        if adapters:
            model.set_submodule(path, LoRAExperts(module, adapters))
        adapted |= {f"{path}.{name}": adapter for name, adapter in adapters.items()}
    return adapted


def _has_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch multiplies all of them at once: on CUDA, in half precision, where every row begins at a multiple of BYTES."""
    lengths = (*x.shape[1:], *weight.shape[1:])
    whole = not any(length * x.element_size() % BYTES for length in lengths)
    return x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and whole and torch.cuda.get_device_capability() >= CAPABLE
