"""LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024) beside frozen layers, plain or quantised."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


class LoRALinear(torch.nn.Module):
    """base(x) + scale * B A x. A and B are float32, and multiply in the dtype of x.

    With DoRA each row of the sum, which is as long as it may be, is made as long as `lora_magnitude_vector` says.
    """

    def __init__(self, base: torch.nn.Linear, rank: int, scale: float, dropout: float, dora: bool) -> None:
        """`base`: the frozen layer [out, in]."""
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        device = base.weight.device
        self.lora_A = torch.nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.lora_B = torch.nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        if dora:
            self.lora_magnitude_vector = torch.nn.Parameter(torch.ones(base.out_features, device=device))
            self.register_buffer("_squares", row_norms(base).square_(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        dora = hasattr(self, "lora_magnitude_vector")
        output = self._unbiased(x) if dora else _through(self.base, x)
        dropped = F.dropout(x, self.dropout, self.training)
        low = dropped.reshape(-1, x.shape[-1]) @ self.lora_A.to(x.dtype).T
        flat = output.reshape(-1, output.shape[-1])
        summed = torch.addmm(flat, low, self.lora_B.to(x.dtype).T, alpha=self.scale)
        if dora:
            summed = summed * (self.lora_magnitude_vector / self._lengths()).to(x.dtype)
            summed = summed if self.base.bias is None else summed + self.base.bias
        return summed.reshape(output.shape)

    def row_lengths(self) -> torch.Tensor:
        """Of the frozen weight, float32 [out]; of DoRA alone, which keeps them: the weight itself may be cut over processes."""
        return self._squares.sqrt()

    @property
    def drops(self) -> bool:
        """Whether dropout acts now."""
        return bool(self.dropout and self.training)

    def _unbiased(self, x: torch.Tensor) -> torch.Tensor:
        output = _through(self.base, x)
        return output if self.base.bias is None else output - self.base.bias

    @torch.no_grad()
    def _lengths(self) -> torch.Tensor:
        """Of the rows of W + scale * B A, float32 [out], which no gradient goes through; W is never written out.

        |w + s b A|^2 = |w|^2 + 2 s b (w A^T) + s^2 b (A A^T) b^T, and the layer itself computes W A^T.
        """
        a, b = self.lora_A, self.lora_B
        crossed = self._unbiased(a.to(_dtype_of(self.base))).float().T  # [out, rank]
        squares = self._squares + (b * (2 * self.scale * crossed + self.scale**2 * (b @ (a @ a.T)))).sum(1)
        return squares.sqrt()


def _through(base: Any, x: torch.Tensor) -> torch.Tensor:
    """base(x)."""
    output: torch.Tensor = _EightBits.apply(x, base) if type(base).__name__ == "Linear8bitLt" else base(x)
    return output


class _EightBits(torch.autograd.Function):
    """A layer in 8 bits of bitsandbytes, whose own gradient keeps the input out of reach of layers that are computed again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, base: Any) -> torch.Tensor:
        ctx.base = base
        output: torch.Tensor = base(x)
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        state, weight = ctx.base.state, ctx.base.weight
        rows, lengths = (state.CB, state.SCB) if state.CB is not None else (weight.CB, weight.SCB)
        return upstream[0] @ (rows.to(upstream[0].dtype) * (lengths / 127).to(upstream[0].dtype)[:, None]), None


class LoRAEmbedding(torch.nn.Module):
    """base(tokens) + scale * (B A)^T of their rows; `lora_embedding_A` is [rank, vocabulary], `lora_embedding_B` [width, rank]."""

    def __init__(self, base: torch.nn.Embedding, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.scalar_embed_scale = getattr(base, "scalar_embed_scale", 1.0)  # Gemma's embeddings are scaled as they are looked up
        device = base.weight.device
        self.lora_embedding_A = torch.nn.Parameter(torch.zeros(rank, base.num_embeddings, device=device))
        self.lora_embedding_B = torch.nn.Parameter(torch.zeros(base.embedding_dim, rank, device=device))

    @property
    def weight(self) -> torch.Tensor:
        """Of the frozen layer."""
        return self.base.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., width]."""
        rows = F.embedding(tokens, self.lora_embedding_A.T)
        embedded: torch.Tensor = self.base(tokens)
        return embedded + (self.scale * self.scalar_embed_scale * (rows @ self.lora_embedding_B.T)).to(embedded.dtype)


class TiedHead(torch.nn.Module):
    """A head whose weight is that of embeddings which are adapted: it changes with them."""

    def __init__(self, base: torch.nn.Linear, embedding: LoRAEmbedding) -> None:
        super().__init__()
        self.base, self.weight = base, base.weight
        self._embedding = [embedding]  # in a list: not a submodule of this one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., vocabulary]."""
        one = self._embedding[0]
        low = x @ one.lora_embedding_B.to(x.dtype)
        logits: torch.Tensor = self.base(x) + one.scale * (low @ one.lora_embedding_A.to(x.dtype))
        return logits


@torch.no_grad()
def row_norms(linear: Any, rows: int = 256) -> torch.Tensor:
    """The length of each row of the weight as the layer uses it, float32 [out]; a quantised one is asked for its columns."""
    if isinstance(linear.weight, torch.nn.Parameter) and linear.weight.is_floating_point():
        return torch.cat([part.float().norm(dim=1) for part in linear.weight.split(rows)])
    squares = torch.zeros(linear.out_features, device=linear.weight.device)
    for start in range(0, linear.in_features, rows):
        one = torch.eye(linear.in_features, dtype=_dtype_of(linear), device=squares.device)[start : start + rows]
        columns = linear(one).float() - (0 if linear.bias is None else linear.bias.float())
        squares += columns.square().sum(0)
    return squares.sqrt()


def _dtype_of(linear: Any) -> torch.dtype:
    """In which a layer computes."""
    dtype: torch.dtype = linear.weight.dtype
    return dtype if dtype.is_floating_point else (getattr(linear, "compute_dtype", None) or torch.float32)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A float32 copy of its own."""
    array: np.ndarray = tensor.detach().to("cpu", torch.float32).numpy().copy()
    return array
