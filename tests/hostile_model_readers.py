"""As hostile_readers.py, of models, adapters, checkpoints and run folders."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import yaml
from hostile_readers import Reader, _dataset, _text
from small_gguf import llama_of_three_tokens, write
from tiny_models import CHATML, tiny_tokenizer

from mlx_finetune.config import RunConfig, load_config
from mlx_finetune.errors import UserError
from mlx_finetune.export.adapter import read_adapter
from mlx_finetune.export.card import split_card
from mlx_finetune.export.facts import read_facts
from mlx_finetune.export.folder_checks import own_template
from mlx_finetune.export.gguf_metadata import read_config as read_gguf_config
from mlx_finetune.export.mlx_adapter import read_parts, read_settings
from mlx_finetune.files import read_json
from mlx_finetune.models.config_checks import check_config
from mlx_finetune.models.gguf import gguf_to_hugging_face
from mlx_finetune.models.hub import check_model_folder
from mlx_finetune.models.mlx_config import is_tied, mlx_overlay
from mlx_finetune.models.origin import Origin, original_folder, write_origin
from mlx_finetune.models.plain_config import plain_config
from mlx_finetune.models.quantised_sources import packed_by
from mlx_finetune.models.sentencepiece_model import read_sentencepiece
from mlx_finetune.models.spiece import spiece_to_tokenizer
from mlx_finetune.models.torch_bin import bin_to_safetensors
from mlx_finetune.models.torch_pickle import read_tensors
from mlx_finetune.models.weights import fingerprint, read_float32, tensor_headers
from mlx_finetune.planning.model_shape import model_shape
from mlx_finetune.report.of_run import of_run
from mlx_finetune.serving.trained import read_trained
from mlx_finetune.training.checkpoint import load_checkpoint
from mlx_finetune.training.start import read_start
from mlx_finetune.training.tracking import identity

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


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _weights(folder: Path) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (4, 8), f"{PATH}.q_proj.weight": (8, 8), "model.norm.weight": (8,)}
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    _json(folder / "config.json", CONFIG)


def _shards(folder: Path) -> None:
    _weights(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = ("model.embed_tokens.weight", f"{PATH}.q_proj.weight", "model.norm.weight")
    _json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": 416}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")},
    )


def _read_weights(folder: Path) -> None:
    for location in tensor_headers(folder).values():
        assert 0 <= location.start <= location.end <= location.file.stat().st_size and location.file.parent == folder
        if location.dtype == "F32":
            assert read_float32(location).shape == location.shape
    fingerprint(folder)


def _state() -> dict[str, Any]:
    import torch

    wide = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {"a": wide, "b": wide.T, "c": torch.nn.Parameter(wide[:2].clone()), "d": torch.ones(3, dtype=torch.bfloat16)}


def _torch(**how: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        import torch

        torch.save(_state(), folder / "pytorch_model.bin", **how)

    return write


def _torch_shards(folder: Path) -> None:
    _torch()(folder)
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    _json(folder / "pytorch_model.bin.index.json", {"weight_map": dict.fromkeys("abcd", "pytorch_model-00001-of-00001.bin")})


def _into(folder: Path, call: Callable[[Path], object]) -> None:
    """Calls with an empty folder for what is written, which has to be whole or empty afterwards."""
    out = folder / "out"
    rmtree(out, ignore_errors=True)
    out.mkdir()
    try:
        call(out)
    except UserError:
        assert not list(out.iterdir()), "something half-written was left"
        raise


def _pickle(folder: Path) -> None:
    import zipfile

    _torch()(folder)
    with zipfile.ZipFile(folder / "pytorch_model.bin") as archive:
        (folder / "data.pkl").write_bytes(archive.read("pytorch_model/data.pkl"))


def _read_torch(folder: Path) -> None:
    _into(folder, lambda out: bin_to_safetensors(folder, out))


def _read_pickle(folder: Path) -> None:
    read_tensors((folder / "data.pkl").read_bytes(), str(folder / "data.pkl"))


def _gguf(folder: Path) -> None:
    writer = llama_of_three_tokens(folder / "small.gguf", types=(1, 1, 3))
    writer.add_eos_token_id(2)
    write(writer, {"token_embd.weight": np.ones((3, 8), np.float32), "blk.0.attn_q.weight": np.ones((8, 8), np.float32)})


def _read_gguf(folder: Path) -> None:
    out = folder / "hf"
    rmtree(out, ignore_errors=True)
    gguf_to_hugging_face(folder / "small.gguf", out)
    tensor_headers(out)


def _spiece(folder: Path) -> None:
    from tiny_replit import SPECIAL, train_spiece

    train_spiece(folder / "spiece.model", **SPECIAL)
    _json(folder / "tokenizer_config.json", {"eos_token": "<|endoftext|>", "added_tokens_decoder": {"0": {"content": "<unk>"}}})


def _tokenizer(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    _weights(folder)
    _json(folder / "generation_config.json", {"eos_token_id": [2]})


def write_model(folder: Path) -> None:
    """A model as CONFIG says it, with a tokenizer and a template; made without torch."""
    from safetensors.numpy import save_file

    _tokenizer(folder)
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


def _load_template(folder: Path) -> None:
    from mlx_finetune.data.template import ChatTemplate

    check_model_folder(folder)
    ChatTemplate.load(folder)


def _check_model(folder: Path) -> None:
    check_model_folder(folder)
    own_template(folder)


def _config(folder: Path) -> None:
    _json(folder / "config.json", CONFIG)


def _read_model_config(folder: Path) -> None:
    config = read_json(folder / "config.json")
    model_shape(str(folder / "config.json"))
    check_config(config, "config.json")
    is_tied(config), mlx_overlay(config), plain_config(config), packed_by(config)
    read_gguf_config(folder)


def _peft(folder: Path) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"base_model.model.{PATH}.{name}.lora_{side}.weight": np.ones((2, 8) if side == "A" else (8, 2), np.float32)
        for name in ("q_proj", "v_proj")
        for side in "AB"
    }
    save_file(arrays, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _json(folder / "adapter_config.json", PEFT)


def _read_peft(folder: Path) -> None:
    for read in (lambda: read_adapter(folder), lambda: read_start(folder, 1)):
        try:
            read()
        except UserError as error:
            last = error
        else:
            last = None
    if last:
        raise last


def _mlx(folder: Path) -> None:
    from safetensors.numpy import save_file

    arrays = {f"{PATH}.q_proj.lora_a": np.ones((8, 2), np.float32), f"{PATH}.q_proj.lora_b": np.ones((2, 8), np.float32)}
    save_file(arrays, folder / "adapters.safetensors")
    _json(folder / "adapter_config.json", MLX)


def _read_mlx(folder: Path) -> None:
    kind, _ = read_settings(folder / "adapter_config.json")
    read_parts(folder / "adapters.safetensors", kind)
    read_start(folder, 1)


def _run(folder: Path) -> None:
    """A run of two steps, as far as no engine is needed to read it."""
    from safetensors.numpy import save_file

    run = folder / "run"
    checkpoint = run / "checkpoints" / "step-000002"
    _peft(checkpoint)
    save_file({"m/a": np.ones(2, np.float32)}, checkpoint / "optimizer.safetensors")
    (folder / "model").mkdir()
    _weights(folder / "model")
    (folder / "model" / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n# M\n")
    _dataset(folder)
    config = RunConfig(model=str(folder / "model"), data=str(folder / "data"), out=str(run), steps=2)
    (run / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    info = json.loads((folder / "data" / "dataset.json").read_text())
    _json(
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

    _json(run / "evaluation.json", evaluation("step-000002"))
    _json(run / "tracked.json", {"id": "0123456789ab"})
    message = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "source": "gptme",
        "conversation": "c",
    }
    (folder / "data" / "train.jsonl").write_text(json.dumps(message) + "\n")


def _read_run(folder: Path) -> None:
    """What report, fuse, export, serve and trackers read of it."""
    from mlx_finetune.evaluation.compare import find_checkpoint

    run, refused = folder / "run", None
    calls: list[Callable[[], object]] = [
        lambda: of_run(run),
        lambda: load_checkpoint(find_checkpoint(run, "latest")),
        lambda: read_facts(run, find_checkpoint(run, "latest"), folder / "model", load_config(run / "config.yaml", {})),
        lambda: identity(run),
        lambda: read_trained(load_config(run / "config.yaml", {})),
    ]
    for call in calls:
        try:
            call()
        except UserError as error:
            refused = error
    if refused:
        raise refused


def _origin(folder: Path) -> None:
    (folder / "base").mkdir()
    (folder / "made").mkdir()
    _weights(folder / "base")
    origin = Origin("huggingface", str(folder / "base"), None, fingerprint(folder / "base"), {"bits": 4, "group_size": 32}, None)
    write_origin(folder / "made", origin)


RUN = "run/checkpoints/step-000002"
READERS: dict[str, Reader] = {
    "safetensors": Reader("model.safetensors", _weights, _read_weights),
    "shard": Reader("model-00001-of-00001.safetensors", _shards, _read_weights),
    "index of shards": Reader("model.safetensors.index.json", _shards, _read_weights),
    "torch zip": Reader("pytorch_model.bin", _torch(), _read_torch, slow=True),
    "torch protocol 5": Reader("pytorch_model.bin", _torch(pickle_protocol=5), _read_torch, slow=True),
    "torch legacy": Reader("pytorch_model.bin", _torch(_use_new_zipfile_serialization=False), _read_torch, slow=True),
    "torch index": Reader("pytorch_model.bin.index.json", _torch_shards, _read_torch, slow=True),
    "pickle": Reader("data.pkl", _pickle, _read_pickle, slow=True),
    "gguf": Reader("small.gguf", _gguf, _read_gguf, slow=True),
    "sentencepiece": Reader("spiece.model", _spiece, lambda folder: read_sentencepiece(folder / "spiece.model"), slow=True),
    "sentencepiece settings": Reader(
        "tokenizer_config.json",
        _spiece,
        lambda folder: _into(folder, lambda out: spiece_to_tokenizer(folder / "spiece.model", out)),
        slow=True,
    ),
    "sentencepiece whole": Reader(
        "spiece.model",
        _spiece,
        lambda folder: _into(folder, lambda out: spiece_to_tokenizer(folder / "spiece.model", out)),
        slow=True,
    ),
    "tokenizer.json": Reader("tokenizer.json", _tokenizer, _load_template, slow=True),
    "tokenizer_config.json": Reader("tokenizer_config.json", _tokenizer, _load_template, slow=True),
    "chat template": Reader("chat_template.jinja", _tokenizer, _load_template, slow=True),
    "generation_config.json": Reader("generation_config.json", _tokenizer, _load_template, slow=True),
    "model folder": Reader("config.json", _tokenizer, _check_model, slow=True),
    "config.json": Reader("config.json", _config, _read_model_config, slow=True),
    "peft settings": Reader("adapter_config.json", _peft, _read_peft),
    "peft tensors": Reader("adapter_model.safetensors", _peft, _read_peft),
    "mlx-lm settings": Reader("adapter_config.json", _mlx, _read_mlx),
    "mlx-lm tensors": Reader("adapters.safetensors", _mlx, _read_mlx),
    "origin.json": Reader("made/origin.json", _origin, lambda folder: original_folder(folder / "made")),
    "run config": Reader("run/config.yaml", _run, _read_run, slow=True),
    "progress.json": Reader(f"{RUN}/progress.json", _run, _read_run, slow=True),
    "moments": Reader(f"{RUN}/optimizer.safetensors", _run, _read_run, slow=True),
    "run adapter": Reader(f"{RUN}/adapter_config.json", _run, _read_run, slow=True),
    "metrics": Reader("run/metrics.jsonl", _run, _read_run, slow=True),
    "samples": Reader("run/samples.jsonl", _run, _read_run, slow=True),
    "evaluation.json": Reader("run/evaluation.json", _run, _read_run, slow=True),
    "tracked.json": Reader("run/tracked.json", _run, _read_run, slow=True),
    "training messages": Reader("data/train.jsonl", _run, _read_run, slow=True),
    "run dataset.json": Reader("data/dataset.json", _run, _read_run, slow=True),
    "model card": Reader(
        "README.md",
        _text("README.md", "---\nlicense: mit\n---\n# M\n"),
        lambda folder: split_card((folder / "README.md").read_bytes().decode("utf-8", "replace")),
    ),
}
