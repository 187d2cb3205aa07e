"""As hostile_readers.py, of models, adapters, checkpoints and run folders."""

from collections.abc import Callable
from pathlib import Path
from shutil import rmtree

from genuine_files import text_file
from genuine_models import (
    torch_file,
    write_config,
    write_gguf,
    write_made_from,
    write_mlx,
    write_peft,
    write_pickle,
    write_run,
    write_shards,
    write_spiece,
    write_tokenizer,
    write_torch_shards,
    write_weights,
)
from hostile_readers import Reader

from mlx_finetune.config import load_config
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
from mlx_finetune.models.origin import original_folder
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


def _read_weights(folder: Path) -> None:
    for location in tensor_headers(folder).values():
        assert 0 <= location.start <= location.end <= location.file.stat().st_size and location.file.parent == folder
        if location.dtype == "F32":
            assert read_float32(location).shape == location.shape
    fingerprint(folder)


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


def _read_torch(folder: Path) -> None:
    _into(folder, lambda out: bin_to_safetensors(folder, out))


def _read_pickle(folder: Path) -> None:
    read_tensors((folder / "data.pkl").read_bytes(), str(folder / "data.pkl"))


def _read_gguf(folder: Path) -> None:
    out = folder / "hf"
    rmtree(out, ignore_errors=True)
    gguf_to_hugging_face(folder / "small.gguf", out)
    tensor_headers(out)


def _load_template(folder: Path) -> None:
    from mlx_finetune.data.template import ChatTemplate

    check_model_folder(folder)
    ChatTemplate.load(folder)


def _check_model(folder: Path) -> None:
    check_model_folder(folder)
    own_template(folder)


def _read_model_config(folder: Path) -> None:
    config = read_json(folder / "config.json")
    model_shape(str(folder / "config.json"))
    check_config(config, "config.json")
    is_tied(config), mlx_overlay(config), plain_config(config), packed_by(config)
    read_gguf_config(folder)


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


def _read_mlx(folder: Path) -> None:
    kind, _ = read_settings(folder / "adapter_config.json")
    read_parts(folder / "adapters.safetensors", kind)
    read_start(folder, 1)


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


RUN = "run/checkpoints/step-000002"
READERS: dict[str, Reader] = {
    "safetensors": Reader("model.safetensors", write_weights, _read_weights),
    "shard": Reader("model-00001-of-00001.safetensors", write_shards, _read_weights),
    "index of shards": Reader("model.safetensors.index.json", write_shards, _read_weights),
    "torch zip": Reader("pytorch_model.bin", torch_file(), _read_torch, slow=True),
    "torch protocol 5": Reader("pytorch_model.bin", torch_file(pickle_protocol=5), _read_torch, slow=True),
    "torch legacy": Reader("pytorch_model.bin", torch_file(_use_new_zipfile_serialization=False), _read_torch, slow=True),
    "torch index": Reader("pytorch_model.bin.index.json", write_torch_shards, _read_torch, slow=True),
    "pickle": Reader("data.pkl", write_pickle, _read_pickle, slow=True),
    "gguf": Reader("small.gguf", write_gguf, _read_gguf, slow=True),
    "sentencepiece": Reader("spiece.model", write_spiece, lambda folder: read_sentencepiece(folder / "spiece.model"), slow=True),
    "sentencepiece settings": Reader(
        "tokenizer_config.json",
        write_spiece,
        lambda folder: _into(folder, lambda out: spiece_to_tokenizer(folder / "spiece.model", out)),
        slow=True,
    ),
    "sentencepiece whole": Reader(
        "spiece.model",
        write_spiece,
        lambda folder: _into(folder, lambda out: spiece_to_tokenizer(folder / "spiece.model", out)),
        slow=True,
    ),
    "tokenizer.json": Reader("tokenizer.json", write_tokenizer, _load_template, slow=True),
    "tokenizer_config.json": Reader("tokenizer_config.json", write_tokenizer, _load_template, slow=True),
    "chat template": Reader("chat_template.jinja", write_tokenizer, _load_template, slow=True),
    "generation_config.json": Reader("generation_config.json", write_tokenizer, _load_template, slow=True),
    "model folder": Reader("config.json", write_tokenizer, _check_model, slow=True),
    "config.json": Reader("config.json", write_config, _read_model_config, slow=True),
    "peft settings": Reader("adapter_config.json", write_peft, _read_peft),
    "peft tensors": Reader("adapter_model.safetensors", write_peft, _read_peft),
    "mlx-lm settings": Reader("adapter_config.json", write_mlx, _read_mlx),
    "mlx-lm tensors": Reader("adapters.safetensors", write_mlx, _read_mlx),
    "origin.json": Reader("made/origin.json", write_made_from, lambda folder: original_folder(folder / "made")),
    "run config": Reader("run/config.yaml", write_run, _read_run, slow=True),
    "progress.json": Reader(f"{RUN}/progress.json", write_run, _read_run, slow=True),
    "moments": Reader(f"{RUN}/optimizer.safetensors", write_run, _read_run, slow=True),
    "run adapter": Reader(f"{RUN}/adapter_config.json", write_run, _read_run, slow=True),
    "metrics": Reader("run/metrics.jsonl", write_run, _read_run, slow=True),
    "samples": Reader("run/samples.jsonl", write_run, _read_run, slow=True),
    "evaluation.json": Reader("run/evaluation.json", write_run, _read_run, slow=True),
    "tracked.json": Reader("run/tracked.json", write_run, _read_run, slow=True),
    "training messages": Reader("data/train.jsonl", write_run, _read_run, slow=True),
    "run dataset.json": Reader("data/dataset.json", write_run, _read_run, slow=True),
    "model card": Reader(
        "README.md",
        text_file("README.md", "---\nlicense: mit\n---\n# M\n"),
        lambda folder: split_card((folder / "README.md").read_bytes().decode("utf-8", "replace")),
    ),
}
