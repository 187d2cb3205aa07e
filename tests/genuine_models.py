"""Genuine models, adapters and runs, each file as small as it can be; no engine is needed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from genuine_files import write_prepared
from small_gguf import llama_of_three_tokens, write
from tiny_models import CHATML, tiny_tokenizer

from mlx_finetune.config import RunConfig
from mlx_finetune.models.origin import Origin, write_origin
from mlx_finetune.models.weights import fingerprint

CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "dtype": "float32",
    "head_dim": 4,
    "hidden_act": "silu",
    "attention_bias": False,
}
PEFT: Mapping[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "lora_dropout": 0.0,
    "rank_pattern": {},
    "alpha_pattern": {"v_proj": 8},
    "base_model_name_or_path": "m",
    "task_type": "CAUSAL_LM",
}
MLX: Mapping[str, Any] = {
    "fine_tune_type": "lora",
    "num_layers": 1,
    "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
}
PATH = "model.layers.0.self_attn"


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_weights(folder: Path) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (4, 8), f"{PATH}.q_proj.weight": (8, 8), "model.norm.weight": (8,)}
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", CONFIG)


def write_shards(folder: Path) -> None:
    write_weights(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = ("model.embed_tokens.weight", f"{PATH}.q_proj.weight", "model.norm.weight")
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": 416}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")},
    )


def _state() -> dict[str, Any]:
    import torch

    wide = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {"a": wide, "b": wide.T, "c": torch.nn.Parameter(wide[:2].clone()), "d": torch.ones(3, dtype=torch.bfloat16)}


def torch_file(**how: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        import torch

        torch.save(_state(), folder / "pytorch_model.bin", **how)

    return write


def write_torch_shards(folder: Path) -> None:
    torch_file()(folder)
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": dict.fromkeys("abcd", "pytorch_model-00001-of-00001.bin")})


def write_pickle(folder: Path) -> None:
    import zipfile

    torch_file()(folder)
    with zipfile.ZipFile(folder / "pytorch_model.bin") as archive:
        (folder / "data.pkl").write_bytes(archive.read("pytorch_model/data.pkl"))


def write_gguf(folder: Path) -> None:
    writer = llama_of_three_tokens(folder / "small.gguf", types=(1, 1, 3))
    writer.add_eos_token_id(2)
    write(writer, {"token_embd.weight": np.ones((3, 8), np.float32), "blk.0.attn_q.weight": np.ones((8, 8), np.float32)})


def write_spiece(folder: Path) -> None:
    from tiny_replit import SPECIAL, train_spiece

    train_spiece(folder / "spiece.model", **SPECIAL)
    write_json(
        folder / "tokenizer_config.json", {"eos_token": "<|endoftext|>", "added_tokens_decoder": {"0": {"content": "<unk>"}}}
    )


def write_tokenizer(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    write_weights(folder)
    write_json(folder / "generation_config.json", {"eos_token_id": [2]})


def write_model(folder: Path) -> None:
    """A model as CONFIG says it, with a tokenizer and a template; made without torch."""
    from safetensors.numpy import save_file

    write_tokenizer(folder)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (320, 8), "model.norm.weight": (8,)}
    shapes |= {
        f"{PATH}.{name}.weight": (rows, 8)
        for name, rows in zip(("q_proj", "k_proj", "v_proj", "o_proj"), (8, 4, 4, 8), strict=True)
    }
    layer = PATH.removesuffix(".self_attn")
    shapes |= {f"{layer}.{name}.weight": (8,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {
        f"{layer}.mlp.{name}.weight": shape
        for name, shape in (("gate_proj", (16, 8)), ("up_proj", (16, 8)), ("down_proj", (8, 16)))
    }
    arrays = {name: np.full(shape, 0.1, np.float32) for name, shape in shapes.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


def write_config(folder: Path) -> None:
    write_json(folder / "config.json", CONFIG)


def write_peft(folder: Path) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"base_model.model.{PATH}.{name}.lora_{side}.weight": np.ones((2, 8) if side == "A" else (8, 2), np.float32)
        for name in ("q_proj", "v_proj")
        for side in "AB"
    }
    save_file(arrays, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", PEFT)


def write_mlx(folder: Path) -> None:
    from safetensors.numpy import save_file

    arrays = {f"{PATH}.q_proj.lora_a": np.ones((8, 2), np.float32), f"{PATH}.q_proj.lora_b": np.ones((2, 8), np.float32)}
    save_file(arrays, folder / "adapters.safetensors")
    write_json(folder / "adapter_config.json", MLX)


def write_run(folder: Path) -> None:
    """A run of two steps, as far as no engine is needed to read it."""
    from safetensors.numpy import save_file

    run = folder / "run"
    checkpoint = run / "checkpoints" / "step-000002"
    write_peft(checkpoint)
    save_file({"m/a": np.ones(2, np.float32)}, checkpoint / "optimizer.safetensors")
    (folder / "model").mkdir()
    write_weights(folder / "model")
    (folder / "model" / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n# M\n")
    write_prepared(folder)
    config = RunConfig(model=str(folder / "model"), data=str(folder / "data"), out=str(run), steps=2)
    (run / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    info = json.loads((folder / "data" / "dataset.json").read_text())
    write_json(
        checkpoint / "progress.json",
        {
            "step": 2,
            "seed": 0,
            "data": info["id"],
            "model": "0",
            "engine": "torch",
            "device": "cpu",
            "versions": {"numpy": "2"},
            "config": config.to_dict(),
        },
    )
    (run / "latest").symlink_to("checkpoints/step-000002")
    rows: list[dict[str, Any]] = [{"step": 0, "split": "valid", "loss": 3.0, "by_source": {"gptme": 3.0}}]
    rows += [
        {
            "step": i,
            "split": "train",
            "loss": 2.0,
            "tokens": 9,
            "grad_norm": 1.0,
            "computed": 9,
            "learning_rate": 1e-4,
            "seconds": 0.1,
            "memory": 9,
        }
        for i in (1, 2)
    ]
    rows += [{"step": 2, "split": "valid", "loss": 2.5, "by_source": {"gptme": 2.5}}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "samples.jsonl").write_text(
        json.dumps({"step": 2, "prompt": 0, "conversation": "c", "question": "q", "logged": "l", "answer": "a"}) + "\n"
    )
    from reported_runs import evaluation

    write_json(run / "evaluation.json", evaluation("step-000002"))
    write_json(run / "tracked.json", {"id": "0123456789ab"})
    message = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "source": "gptme",
        "conversation": "c",
    }
    (folder / "data" / "train.jsonl").write_text(json.dumps(message) + "\n")


def write_made_from(folder: Path) -> None:
    (folder / "base").mkdir()
    (folder / "made").mkdir()
    write_weights(folder / "base")
    origin = Origin("huggingface", str(folder / "base"), None, fingerprint(folder / "base"), {"bits": 4, "group_size": 32}, None)
    write_origin(folder / "made", origin)
