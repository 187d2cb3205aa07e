"""gpt-oss as it is published: experts in mxfp4, blocks of 16 bytes and a scale for each 32 numbers, all else as it was."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tiny_models import make_tiny

SETTINGS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
}


def make_mxfp4(folder: Path, tokenizer: bool) -> Path:
    """A tiny random gpt-oss."""
    import mlx.core as mx

    make_tiny("gpt_oss", folder, tokenizer=tokenizer, changes={"intermediate_size": 64})
    packed = {}
    for name, array in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            turned = mx.array(np.ascontiguousarray(array.swapaxes(-1, -2)))
            blocks, scales = mx.quantize(turned, group_size=32, bits=4, mode="mxfp4")
            packed[f"{name}_blocks"] = np.array(blocks).view(np.uint8).reshape(*scales.shape, 16)
            packed[f"{name}_scales"] = np.array(scales)
        else:
            packed[name] = array
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": SETTINGS}))
    return folder
