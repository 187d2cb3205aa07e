"""An adapter handed to peft and to mlx-lm in one folder: the same logits there as in the engine that trained it, and back again."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_runs import WORDS, make_base, make_run
from safetensors.numpy import load_file, save_file

from mlx_finetune.config import make_config
from mlx_finetune.data.batches import Batch, Example
from mlx_finetune.engines import Engine, open_engine
from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.compare import find_checkpoint, open_run
from mlx_finetune.export.adapter_checks import Opened
from mlx_finetune.export.adapter_folder import Exported, export_adapter, plain_targets
from mlx_finetune.export.distance import VerificationError
from mlx_finetune.export.facts import read_facts
from mlx_finetune.export.in_engine import logits_of
from mlx_finetune.export.push import choose_files, find_private
from mlx_finetune.models.mlx_config import mlx_overlay
from mlx_finetune.models.weights import tensor_headers
from mlx_finetune.training.start import begin, started

ROWS = [[5, 17, 300, 2, 44, 101, 9], [200, 3, 3, 61]]
LAYERS = 4
# What is adapted and how, by name: settings of the run.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora in the last two layers": {"fine_tune_type": "dora", "num_layers": 2},
    "rslora of embeddings and head": {"use_rslora": True, "target_modules": ("q_proj", "down_proj", "embed_tokens", "lm_head")},
}
DORA, RSLORA = "dora in the last two layers", "rslora of embeddings and head"
MAKES = {"lora": "mlx", DORA: "torch", RSLORA: "torch"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of each kind, never written to."""
    root = tmp_path_factory.mktemp("runs")
    make_base(root)
    return {kind: make_run(root, MAKES[kind], kind, **values) for kind, values in KINDS.items()}


@dataclass(frozen=True)
class Handed:
    """A folder made of a run, what was said of it, and the logits of the tuned model and of its base in the engine."""

    folder: Path
    model: Path
    exported: Exported
    opened: Opened
    expected: list[np.ndarray]
    base: list[np.ndarray]

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads((self.folder / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def handed(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Handed]:
    """The adapter of each run for both libraries, never written to."""
    made = {}
    for kind, run in runs.items():
        out = tmp_path_factory.mktemp("out") / "adapter"
        made[kind] = Handed(out, run.parent / "base", *export(run, out), *trained(run))
    return made


def close(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> bool:
    """Float32 in two libraries: sums of the same numbers in another order."""
    return all(np.abs(one - other).max() < 2e-5 * np.abs(other).max() for one, other in zip(found, expected, strict=True))


def logits(engine: Engine) -> list[np.ndarray]:
    batches = [Batch.of([Example(np.array([*row, 0], np.int32), ones(len(row)), "", "", ())]) for row in ROWS]
    return [engine.logits(batch) for batch in batches]


def ones(count: int) -> np.ndarray:
    return np.array([0] + [1] * count, np.float32)


def trained(run: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Logits of the tuned model in the engine of the run, and of its base."""
    config, model, checkpoint = open_run(run, "best")
    base = logits(open_engine(make_config({"engine": "mlx"}, "test"), model))
    return list(logits_of(model, checkpoint, config.engine, ROWS)), base


def in_peft(model: Path, folder: Path) -> Iterator[np.ndarray]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), folder).eval()
    with torch.no_grad():
        for row in ROWS:
            yield tuned(torch.tensor([row])).logits[0].numpy()


def in_mlx_lm(model: Path, folder: Path) -> Iterator[np.ndarray]:
    import mlx.core as mx
    from mlx_lm import load

    overlay = mlx_overlay(json.loads((model / "config.json").read_text()))
    tuned = load(str(model), adapter_path=str(folder), model_config=overlay)[0]
    for row in ROWS:
        yield np.array(tuned(mx.array([row]))[0].astype(mx.float32))


def export(run: Path, out: Path, to: Any = "peft") -> tuple[Any, Any]:
    config, model, checkpoint = open_run(run, "best")
    return export_adapter(model, checkpoint, out, to, facts=read_facts(run, checkpoint, model, config))


@pytest.mark.parametrize("kind", KINDS)
def test_one_folder_is_opened_by_peft_and_by_mlx_lm_with_the_logits_of_the_engine_that_trained(kind, handed):
    made = handed[kind]
    assert not close(made.base, made.expected)
    assert close(list(in_peft(made.model, made.folder)), made.expected)
    assert close(list(in_mlx_lm(made.model, made.folder)), made.expected)
    assert made.exported.formats == ["peft", "mlx-lm"] and set(made.opened.readers) == {"peft", "mlx-lm"}
    assert made.opened.engine == MAKES[kind]
    assert all(one.same + one.tied == one.tokens == made.opened.positions for one in made.opened.readers.values())
    assert {"README.md", "verification.json", "tokenizer.json", "LICENSE"} <= {path.name for path in made.folder.iterdir()}


@pytest.mark.parametrize("form", ["peft", "mlx-lm"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_started_from_the_exported_folder_begins_with_the_same_logits(kind, form, engine_name, handed, tmp_path):
    made = handed[kind]
    folder = Path(shutil.copytree(made.folder, tmp_path / "adapter"))
    if form == "mlx-lm":  # as mlx-lm itself would have written it
        (folder / "adapter_model.safetensors").unlink()
        alone = {key: made.settings[key] for key in ("fine_tune_type", "num_layers", "lora_parameters")}
        (folder / "adapter_config.json").write_text(json.dumps(alone))
    told = {"engine": engine_name, "dtype": "float32", "adapter_path": str(folder), "model": str(made.model)}
    config = started(make_config(told, "test"), LAYERS)
    engine = open_engine(config, made.model)
    begin(engine, config, LAYERS)
    assert close(logits(engine), made.expected)


def test_names_are_plain_where_every_module_of_the_name_is_adapted_and_paths_where_not(handed):
    every, last = (handed[kind].settings for kind in ("lora", DORA))
    assert every["target_modules"] == "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj".split()
    assert len(last["target_modules"]) == 14 and all(".2." in name or ".3." in name for name in last["target_modules"])
    assert (every["num_layers"], last["num_layers"]) == (4, 2)
    assert last["lora_parameters"]["keys"] == last["target_modules"]
    headers = tensor_headers(handed["lora"].model)
    with_experts = headers | {"model.layers.0.mlp.experts.0.up_proj.weight": headers["lm_head.weight"]}
    q_projections = {f"model.layers.{layer}.self_attn.q_proj" for layer in range(4)}
    assert plain_targets(q_projections, headers) == ["q_proj"]
    assert plain_targets(q_projections, with_experts) == sorted(q_projections)


def test_mlx_lm_is_given_the_scale_of_rslora_itself(handed):
    settings = handed[RSLORA].settings
    assert settings["use_rslora"] and settings["lora_alpha"] == 8
    assert settings["lora_parameters"]["scale"] == 8 / 4**0.5


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_person_stands_in_the_folder(kind, handed):
    place = str(handed[kind].model.parent)
    for path in handed[kind].folder.iterdir():
        data = path.read_bytes()
        assert place.encode() not in data and not any(word.encode() in data for word in WORDS.split()), path.name
    assert handed[kind].settings["base_model_name_or_path"] == "base"
    assert find_private(handed[kind].folder, list(choose_files(handed[kind].folder).files), Path("/home/jo.nasim")) == []


@pytest.mark.parametrize("library", ["peft", "mlx-lm"])
def test_an_adapter_that_a_library_would_read_otherwise_never_appears(library, runs, tmp_path, monkeypatch):
    """Of each file one number is doubled after it is written and before it is opened."""
    from mlx_finetune.export import adapter_folder

    name = {"peft": "adapter_model.safetensors", "mlx-lm": "adapters.safetensors"}[library]
    check = adapter_folder.check_readers

    def spoil_and_check(model: Path, checkpoint: Path, folder: Path, formats: Sequence[str]) -> Any:
        tensors = load_file(folder / name)
        first = min(key for key in tensors if "lora_B" in key or key.endswith("lora_b"))
        save_file(tensors | {first: np.ascontiguousarray(-tensors[first])}, folder / name)
        return check(model, checkpoint, folder, formats)

    monkeypatch.setattr(adapter_folder, "check_readers", spoil_and_check)
    with pytest.raises(VerificationError, match=f"{library} makes other logits"):
        export(runs["lora"], tmp_path / "adapter")
    assert not any(tmp_path.iterdir())


def test_embeddings_that_are_the_head_are_for_mlx_lm_alone(tmp_path):
    make_base(tmp_path, "qwen2", changes={"tie_word_embeddings": True})
    run = make_run(tmp_path, "mlx", target_modules=("q_proj", "embed_tokens"))
    with pytest.raises(UserError, match="peft cannot have it: on embeddings that are the head too"):
        export(run, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    exported, _ = export(run, tmp_path / "adapter", "mlx-lm")
    assert exported.formats == ["mlx-lm"] and "not for peft" in exported.remarks[0]
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert "lm_head.lora_a" not in load_file(tmp_path / "adapter" / "adapters.safetensors")
    assert close(list(in_mlx_lm(tmp_path / "base", tmp_path / "adapter")), trained(run)[0])


def test_a_base_that_mlx_quantised_is_for_mlx_lm_alone(tmp_path):
    from mlx_lm import convert

    make_base(tmp_path)
    (tmp_path / "base").rename(tmp_path / "whole")
    convert(str(tmp_path / "whole"), str(tmp_path / "base"), quantize=True, q_group_size=32, q_bits=4)
    run = make_run(tmp_path, "mlx", target_modules=("q_proj", "lm_head"))
    with pytest.raises(UserError, match="peft cannot have it: base is quantised") as caught:
        export(run, tmp_path / "adapter")
    assert caught.value.hint == "--to mlx-lm"
    exported, opened = export(run, tmp_path / "adapter", "mlx-lm")
    assert exported.formats == ["mlx-lm"] and opened.readers["mlx-lm"].base > 0.1


def test_an_architecture_that_mlx_does_not_have_is_for_peft_alone(tmp_path):
    make_base(tmp_path, "arcee")
    run = make_run(tmp_path, "torch", target_modules=("q_proj", "up_proj"))
    with pytest.raises(UserError, match="mlx-lm cannot have it: architecture 'arcee'"):
        export(run, tmp_path / "adapter", "mlx-lm")
    exported, opened = export(run, tmp_path / "adapter")
    assert exported.formats == ["peft"] and list(opened.readers) == ["peft"]
    assert "lora_parameters" not in json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())


def test_without_torch_the_folder_is_proven_by_mlx_lm_alone_and_says_so(runs, handed, tmp_path):
    program = (
        "import sys; sys.modules['torch'] = sys.modules['peft'] = None\n"  # as on a machine without them
        "from pathlib import Path\n"
        "from mlx_finetune.evaluation.compare import open_run\n"
        "from mlx_finetune.export.adapter_folder import export_adapter\n"
        "_, model, checkpoint = open_run(Path(sys.argv[1]), 'best')\n"
        "exported, opened = export_adapter(model, checkpoint, Path(sys.argv[2]), 'peft')\n"
        "print(exported.formats, list(opened.readers), opened.not_asked, opened.engine)\n"
    )
    arguments = [str(runs[DORA]), str(tmp_path / "adapter")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['peft', 'mlx-lm'] ['mlx-lm'] ['peft'] mlx\n"  # which torch trained
    assert close(list(in_peft(handed[DORA].model, tmp_path / "adapter")), handed[DORA].expected)


def test_weights_that_were_trained_are_no_adapter(runs, tmp_path):
    run = make_run(runs["lora"].parent, "torch", "full", fine_tune_type="full", learning_rate=1e-3)
    with pytest.raises(UserError, match="the weights themselves were trained"):
        export(run, tmp_path / "adapter")


def test_the_command_says_what_it_made_and_refuses_what_it_cannot(runs, cli, tmp_path):
    run, base = shutil.copytree(runs["lora"], tmp_path / "run", symlinks=True), runs["lora"].parent / "base"
    status, out, err = cli("export", run, "--to", "mlx-lm", "--out", "adapter", "--base", "org/base", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["exported"]["formats"] == ["peft", "mlx-lm"]
    assert json.loads(Path("adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    for arguments, message, hint in (
        ((run, "--to", "pefd", "--out", "x"), "--to pefd", "did you mean peft?"),
        ((run, "--to", "peft", "--out", "adapter"), "adapter exists already", "choose another --out"),
        ((tmp_path, "--to", "peft", "--out", "x"), "not a run", "mlx-finetune train"),
        ((tmp_path, "--to", "gguf", "--out", "x"), "neither a run nor a model folder", "mlx-finetune"),
        ((run, "--to", "peft", "--out", "x", "--checkpoint", "step-7"), "no checkpoint 'step-7'", "step-000002"),
        ((run, "--to", "peft", "--out", "x", "--adapter-only"), "--adapter-only is for --to gguf", "Ollama takes models"),
        ((run, "--to", "peft", "--out", "x", "--base", "nowhere"), "--base nowhere", "org/name"),
        ((run, "--to", "peft", "--out", "x", "--quantisation", "f16"), "an adapter is not quantised", "leave it out"),
        ((base, "--to", "gguf", "--out", "x", "--base", "org/name"), "is no run", "leave it out"),
        ((base, "--to", "gguf", "--out", "x", "--checkpoint", "best"), "is no run", "leave it out"),
    ):
        status, out, err = cli("export", *arguments)
        assert (status, out) == (2, "") and message in err and hint in err and "Traceback" not in err
        assert not Path("x").exists()


def test_a_run_becomes_a_gguf_file_and_the_fused_folder_beside_it_goes(runs, cli, tmp_path):
    gguf = pytest.importorskip("gguf")
    status, out, err = cli("export", runs["lora"], "--to", "gguf", "--out", "made", "--quantisation", "f16", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["verified"]["verified"]["passed"] and result["bytes"] == Path(result["file"]).stat().st_size
    assert sorted(path.name for path in Path("made").iterdir()) == ["LICENSE", "README.md", "base-f16.gguf", "verification.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]
    assert "token_embd.weight" in {tensor.name for tensor in gguf.GGUFReader("made/base-f16.gguf").tensors}
    status, out, err = cli("export", runs["lora"], "--to", "gguf", "--out", "lora", "--adapter-only")
    assert status == 0 and (tmp_path / "lora" / "base-lora.gguf").is_file(), err
    status, out, err = cli("export", runs["lora"], "--to", "ollama", "--out", "other", "--quantisation", "q9")
    assert status == 2 and "q9" in err and not Path("other").exists()
    status, out, err = cli("export", runs["lora"].parent / "base", "--to", "ollama", "--out", "other", "--quantisation", "f16")
    assert status == 0 and (tmp_path / "other" / "Modelfile").read_text().startswith("FROM ./base-f16.gguf\n"), err


def test_the_best_checkpoint_is_exported_unless_another_is_named(runs, tmp_path):
    assert find_checkpoint(runs["lora"], "best").name in ("step-000002", "step-000004")
    _, model, checkpoint = open_run(runs["lora"], "step-000002")
    export_adapter(model, checkpoint, tmp_path / "adapter", "peft")
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(np.array_equal(written[name], array) for name, array in load_file(checkpoint / "adapter_model.safetensors").items())
