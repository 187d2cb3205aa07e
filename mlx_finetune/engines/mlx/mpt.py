"""MPT (MosaicML 2023; Replit's code models among them), which mlx-lm does not have, in the shape of mlx-lm's classes.

Pre-norm blocks without biases, exact GELU, and ALiBi (Press et al. 2022) in place of positions: each score of a head is lowered
by the head's slope for each token that lies between query and key. Names of arrays are those of the checkpoint.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import RotatingKVCache

from mlx_finetune.engines.mlx.attention import Layout
from mlx_finetune.errors import UserError

BIAS_MAX = 8  # of ALiBi; transformers knows no other


@dataclass
class ModelArgs(BaseModelArgs):
    """Keys of config.json that differ between models; the others are checked by models/mpt_config.py."""

    model_type: str
    d_model: int
    n_heads: int
    n_layers: int
    vocab_size: int
    max_seq_len: int
    layer_norm_epsilon: float = 1e-5
    attn_config: dict[str, Any] = field(default_factory=dict)
    tie_word_embeddings: bool = True


def alibi_slopes(heads: int) -> mx.array:
    """float32 [heads]: 2^(-8 i / n) for i = 1 to n; where n is no power of two, of the next one every second first."""
    whole = 2 ** math.ceil(math.log2(heads))
    slopes = [2 ** -(BIAS_MAX * (i + 1) / whole) for i in range(whole)]
    return mx.array(slopes if whole == heads else (slopes[1::2] + slopes[::2])[:heads], mx.float32)


class Attention(nn.Module):
    """Causal attention of many heads; `mask` holds ALiBi's biases."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        width = args.d_model
        self.n_heads = args.n_heads
        self.scale = args.attn_config.get("softmax_scale") or (width // args.n_heads) ** -0.5
        self.clip = args.attn_config.get("clip_qkv")
        self.Wqkv = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """[B, T, D] -> the same."""
        joint = self.Wqkv(x)
        if self.clip:
            joint = mx.clip(joint, -self.clip, self.clip)
        batch, length, _ = x.shape
        parts = (part.reshape(batch, length, self.n_heads, -1).transpose(0, 2, 1, 3) for part in mx.split(joint, 3, axis=-1))
        queries, keys, values = parts
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        attended = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        output: mx.array = self.out_proj(attended.transpose(0, 2, 1, 3).reshape(batch, length, -1))
        return output


class FeedForward(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, 4 * width, bias=False)
        self.down_proj = nn.Linear(4 * width, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """[..., D] -> the same."""
        output: mx.array = self.down_proj(nn.gelu(self.up_proj(x)))
        return output


class Block(nn.Module):
    """Attention and a layer of two matrices, each behind a norm and beside what it was given."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.norm_1 = _norm(args)
        self.attn = Attention(args)
        self.norm_2 = _norm(args)
        self.ffn = FeedForward(args.d_model)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """[B, T, D] -> the same."""
        x = x + self.attn(self.norm_1(x), mask, cache)
        output: mx.array = x + self.ffn(self.norm_2(x))
        return output


class Transformer(nn.Module):
    """Embeddings, blocks, and the last norm."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.wte = nn.Embedding(args.vocab_size, args.d_model)
        self.blocks = [Block(args) for _ in range(args.n_layers)]
        self.norm_f = _norm(args)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """int32 [B, T] -> [B, T, D]."""
        hidden = self.wte(inputs)
        caches = cache or [None] * len(self.blocks)
        mask = self._mask(hidden, caches[0])
        for block, own in zip(self.blocks, caches, strict=True):
            hidden = block(hidden, mask, own)
        output: mx.array = self.norm_f(hidden)
        return output

    def _mask(self, hidden: mx.array, cache: Any) -> Any:
        """ALiBi's biases, and next to -inf where a query may not see a key: [..., H, T, keys]; of a `Layout` its own kind."""
        slopes = alibi_slopes(self.args.n_heads)
        if isinstance(cache, Layout):
            self._check_length(cache.longest)
            return cache.sloped(slopes)
        if isinstance(cache, RotatingKVCache):
            raise UserError("an MPT takes no cache that forgets", hint="leave max_kv_size out")
        length = hidden.shape[1]
        seen = create_attention_mask(hidden, cache, return_array=True) if cache is not None else None
        keys = seen.shape[-1] if isinstance(seen, mx.array) else length + (cache.offset if cache is not None else 0)
        self._check_length(keys)
        # Biases are needed up to a number for each query alone, so where a row begins does not matter.
        distance = mx.arange(keys)[None] - mx.arange(keys - length, keys)[:, None]
        seen = seen if isinstance(seen, mx.array) else distance <= 0
        hidden_key = mx.finfo(hidden.dtype).min  # and not -inf: padding sees no key at all, and is to stay a number
        return mx.where(seen, slopes[:, None, None] * distance, hidden_key).astype(hidden.dtype)

    def _check_length(self, length: int) -> None:
        if length > self.args.max_seq_len:
            raise UserError(f"{length} tokens are more than the {self.args.max_seq_len} of this model", hint="give it fewer")


class Model(nn.Module):
    """As mlx-lm's classes."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args, self.model_type = args, args.model_type
        self.transformer = Transformer(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.d_model, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """int32 [B, T] -> logits [B, T, V]."""
        hidden = self.transformer(inputs, cache)
        logits: mx.array = self.transformer.wte.as_linear(hidden) if self.args.tie_word_embeddings else self.lm_head(hidden)
        return logits

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Without a second copy of the embeddings."""
        return {name: w for name, w in weights.items() if name != "lm_head.weight" or not self.args.tie_word_embeddings}

    @property
    def layers(self) -> list[Block]:
        """The blocks."""
        blocks: list[Block] = self.transformer.blocks
        return blocks


def _norm(args: ModelArgs) -> nn.LayerNorm:
    return nn.LayerNorm(args.d_model, eps=args.layer_norm_epsilon, bias=False)
