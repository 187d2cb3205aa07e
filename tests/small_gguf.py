"""Small GGUF files, made with the library of llama.cpp."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gguf import GGUFWriter


def llama_of_three_tokens(
    path: Path, architecture: str = "llama", pre: str = "smollm", types: Sequence[int] = (1, 1, 1)
) -> "GGUFWriter":
    """The metadata of one; more of them and the tensors can be added."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_embedding_length(8)
    writer.add_head_count(2)
    writer.add_context_length(8)
    writer.add_feed_forward_length(8)
    writer.add_block_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_types(list(types))
    writer.add_token_merges(["a b"])
    return writer


def write(writer: "GGUFWriter", tensors: Mapping[str, np.ndarray]) -> None:
    """All of it into its file."""
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
