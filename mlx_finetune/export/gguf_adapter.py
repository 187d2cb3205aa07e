"""A LoRA checkpoint as a GGUF adapter, which llama.cpp adds to the base model's GGUF when it loads both (`--lora`)."""

from pathlib import Path

import numpy as np

from mlx_finetune.engines.adapter import HEAD
from mlx_finetune.errors import UserError
from mlx_finetune.export.adapter import Adapter, Pair, read_adapter
from mlx_finetune.export.changes import base_weights, is_full
from mlx_finetune.export.gguf_kinds import storage
from mlx_finetune.export.gguf_metadata import read_config, write_made_from
from mlx_finetune.export.gguf_write import GGUFSummary, Tensor, announce, finish, heads_of, need_gguf, new_file
from mlx_finetune.files import refuse_existing
from mlx_finetune.models.gguf_names import Naming, gguf_name
from mlx_finetune.models.weights import read_float32
from mlx_finetune.training.manifest import made_from

FUSE = "fuse it, and export the fused model"


def write_gguf_adapter(checkpoint: Path, model: Path, out: Path) -> GGUFSummary:
    """Writes the file `out`: A and B of every adapted matrix in float32, for `model` as write_gguf writes it.

    Rank and alpha are written as they are; of rsLoRA an alpha of equal effect.

    Raises:
        UserError: `out` exists; a broken file; a checkpoint of weights, DoRA, or embeddings that are the head
            as well, which llama.cpp does not adapt.
    """
    refuse_existing(out)
    need_gguf()
    if is_full(checkpoint):
        raise UserError(f"{checkpoint}: holds weights and no adapter", hint=FUSE)
    config, naming = read_config(model)
    adapter = read_adapter(checkpoint)
    base_weights(model, adapter)  # refuses what does not fit this model
    heads = heads_of(config, naming)
    tensors: dict[str, Tensor] = {}
    for module, pair in adapter.pairs.items():
        name, part = _name(checkpoint, naming, module, pair, bool(config.get("tie_word_embeddings")))
        # of embeddings llama.cpp looks rows of A up, one a token
        a = np.ascontiguousarray(read_float32(pair.a).T) if pair.on_embeddings else pair.a
        tensors[f"{name}.lora_a"] = Tensor(a, storage("F32"))
        tensors[f"{name}.lora_b"] = Tensor(pair.b, storage("F32"), heads.get(part, 0))
    with new_file(out) as path:
        from gguf import GGUFType, GGUFWriter, Keys, LlamaFileType

        writer = GGUFWriter(path, naming.name)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, _alpha(adapter))
        writer.add_name(checkpoint.resolve().name)
        write_made_from(writer, made_from(checkpoint))
        writer.add_file_type(int(LlamaFileType.ALL_F32))
        announce(writer, tensors)
        finish(writer, path, tensors)
        size = path.stat().st_size
    return GGUFSummary(naming.name, "f32", len(tensors), size, "")


def _name(checkpoint: Path, naming: Naming, module: str, pair: Pair, tied: bool) -> tuple[str, str]:
    if pair.magnitude is not None:
        raise UserError(f"{checkpoint}: DoRA has no place in a GGUF adapter", hint=FUSE)
    if tied and (pair.on_embeddings or module == HEAD):
        raise UserError(f"{checkpoint}: {module} is adapted, and llama.cpp has one tensor for embeddings and head", hint=FUSE)
    named = gguf_name(naming, f"{module}.weight")
    if named is None:
        raise UserError(f"{checkpoint}: {module} has no place in llama.cpp's {naming.name}", hint=FUSE)
    return named


def _alpha(adapter: Adapter) -> float:
    """llama.cpp multiplies B @ A by alpha / rank, the rank being that of the matrices."""
    rank = next(iter(adapter.pairs.values())).a.shape[0]
    return adapter.scale * rank
