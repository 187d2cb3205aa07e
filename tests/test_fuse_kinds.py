"""Every kind of checkpoint in the original weights: DoRA, embeddings and head, shared weights, weights trained themselves.

The adapters are made and saved by peft, so that what is fused is not read as it was written.
"""

import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import make_tiny, mostly_long

from mlx_finetune.errors import UserError
from mlx_finetune.export.fuse import fuse
from mlx_finetune.export.verify import fuse_and_verify, verify
from mlx_finetune.models.weights import read_float32, tensor_headers

TEXTS = ("List the files of this folder.", "def add(a, b):\n    return a + b\n")
LINEAR = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"
TRAINED = (f"{EMBEDDINGS}.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight")
ADAPTER, WEIGHTS = "adapter_model.safetensors", "model.safetensors"
PREFIX = "base_model.model."

# Kind of checkpoint -> what peft is asked for, and whether embeddings and head of its model share a weight.
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "dora": ({"target_modules": [*LINEAR, HEAD], "use_dora": True}, False),
    "dora with rslora": ({"target_modules": [*LINEAR], "use_dora": True, "use_rslora": True}, False),
    "embeddings and head": ({"target_modules": [*LINEAR, EMBEDDINGS, HEAD]}, False),
    "shared weight": ({"target_modules": [*LINEAR, EMBEDDINGS, HEAD], "ensure_weight_tying": True}, True),
    "shared weight as peft leaves it": ({"target_modules": [*LINEAR, EMBEDDINGS, HEAD], "ensure_weight_tying": True}, True),
    "full": ({}, False),
    "full with a shared weight": ({}, True),
}
BASES = [("llama", "float32"), ("llama", "bfloat16"), ("gemma3_text", "float32")]  # the last scales its embeddings


def peft_checkpoint(model: Path, folder: Path, **settings: Any) -> Path:
    """An adapter with nothing at zero, saved by peft."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = get_peft_model(network, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.4))
            elif "lora_" in name:
                parameter.normal_(std=0.2)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def full_checkpoint(model: Path, folder: Path, size: float = 0.1, names: tuple[str, ...] = TRAINED) -> Path:
    """float32 tensors of the base with noise of `size` of their own spread."""
    rng, headers = np.random.default_rng(6), tensor_headers(model)
    base = {name: read_float32(headers[name]) for name in names}
    noise = {name: size * rng.standard_normal(array.shape, np.float32) for name, array in base.items()}
    folder.mkdir()
    save_file({name: array * (1 + noise[name]) for name, array in base.items()}, folder / WEIGHTS)
    (folder / "progress.json").write_text('{"step": 3}')
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: at.file.read_bytes()[at.start : at.end] for name, at in tensor_headers(folder).items()}


def edit_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def make_model(root: Path, is_tied: bool, model_type: str = "llama", dtype: str = "float32") -> Path:
    changes = {"tie_word_embeddings": is_tied, "num_hidden_layers": 2}
    return make_tiny(model_type, root / f"{model_type}-{dtype}-{is_tied}", tokenizer=True, dtype=dtype, changes=changes)


def make_case(kind: str, root: Path, model_type: str = "llama", dtype: str = "float32") -> tuple[Path, Path]:
    """A model and a checkpoint of that kind for it."""
    settings, is_tied = KINDS[kind]
    model = make_model(root, is_tied, model_type, dtype)
    folder = root / f"checkpoint-{kind}".replace(" ", "-")
    checkpoint = peft_checkpoint(model, folder, **settings) if settings else full_checkpoint(model, folder)
    if kind == "shared weight":  # as the engines write it
        edit_config(checkpoint, **settings | {"ensure_weight_tying": False})
    return model, checkpoint


def expected_changes(kind: str) -> set[str]:
    settings, is_tied = KINDS[kind]
    modules = [module for module in settings.get("target_modules", ()) if not (is_tied and module == HEAD)]
    return {f"{module}.weight" for module in modules} or set(TRAINED)


@pytest.mark.parametrize(("model_type", "dtype"), BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_model_is_the_tuned_one_and_nothing_else_changed(kind, model_type, dtype, tmp_path):
    model, checkpoint = make_case(kind, tmp_path, model_type, dtype)
    fused, verified = fuse_and_verify(model, checkpoint, tmp_path / "fused", TEXTS)
    before, after = bytes_of(model), bytes_of(tmp_path / "fused")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == expected_changes(kind)
    assert fused.tensors == len(expected_changes(kind))
    assert fused.dtypes == ({"float32": "F32", "bfloat16": "BF16"}[dtype],)
    assert (verified.backend, verified.passed) == ("transformers", True)
    assert verified.largest_difference < 1e-4 * verified.largest_logit or dtype == "bfloat16"


@pytest.mark.parametrize(
    ("dtype", "kinds"),
    mostly_long(
        [("float32", tuple(KINDS)), ("bfloat16", tuple(KINDS))], ("float32", ("dora with rslora", "shared weight", "full"))
    ),
)
def test_without_torch_every_kind_is_proven_in_mlx(dtype, kinds, tmp_path):
    cases = [make_case(kind, tmp_path, dtype=dtype) for kind in kinds]
    program = (
        "import sys; sys.modules['torch'] = sys.modules['peft'] = None\n"  # as on a machine without them
        "from pathlib import Path; from mlx_finetune.export.verify import fuse_and_verify, verify\n"
        f"texts = {TEXTS!r}\n"
        "paths = [Path(argument) for argument in sys.argv[1:]]\n"
        "for model, checkpoint in zip(paths[::2], paths[1::2]):\n"
        "    _, found = fuse_and_verify(model, checkpoint, checkpoint.with_suffix('.fused'), texts)\n"
        "    print(found.backend, found.passed, verify(model, checkpoint, model, texts).passed)\n"
    )
    arguments = [str(path) for case in cases for path in case]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mlx", "True", "False"] * len(kinds)


@pytest.mark.parametrize("kind", mostly_long(KINDS, "dora", "full with a shared weight"))
def test_a_forgotten_tensor_does_not_pass(kind, tmp_path):
    model, checkpoint = make_case(kind, tmp_path, dtype="bfloat16")
    fuse(model, checkpoint, tmp_path / "fused")
    assert verify(model, checkpoint, tmp_path / "fused", TEXTS).passed
    for name in expected_changes(kind):
        folder = Path(shutil.copytree(tmp_path / "fused", tmp_path / name))
        at = tensor_headers(folder)[name]
        with at.file.open("r+b") as file:
            file.seek(at.start)
            file.write(bytes_of(model)[name])
        assert not verify(model, checkpoint, folder, TEXTS).passed


def test_embeddings_are_looked_at_beyond_the_tokens_of_the_texts(tmp_path):
    from transformers import AutoTokenizer

    model, checkpoint = make_case("embeddings and head", tmp_path)
    read = {token for text in TEXTS for token in AutoTokenizer.from_pretrained(model)(text)["input_ids"]}
    unread = [token for token in range(320) if token not in read]
    fuse(model, checkpoint, tmp_path / "fused")
    edit_tensors(tmp_path / "fused" / WEIGHTS, lambda tensors: tensors[f"{EMBEDDINGS}.weight"].__setitem__(unread, 0.5))
    assert not verify(model, checkpoint, tmp_path / "fused", TEXTS).passed


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_magnitude_that_is_off_does_not_pass(factor, tmp_path):
    model, checkpoint = make_case("dora", tmp_path, dtype="bfloat16")
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    name = f"{PREFIX}{LINEAR[0]}.lora_magnitude_vector"
    edit_tensors(other / ADAPTER, lambda tensors: tensors.update({name: tensors[name] * np.float32(factor)}))
    fuse(model, other, tmp_path / "fused")
    assert not verify(model, checkpoint, tmp_path / "fused", TEXTS).passed


def test_dora_makes_each_row_as_long_as_its_magnitude_and_turns_it_as_lora_would(tmp_path):
    model, checkpoint = make_case("dora with rslora", tmp_path)
    fuse(model, checkpoint, tmp_path / "fused")
    adapter, base = load_file(checkpoint / ADAPTER), load_file(model / WEIGHTS)
    for module, name in ((module, f"{PREFIX}{module}") for module in LINEAR):
        a, b = (adapter[f"{name}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        summed = base[f"{module}.weight"] + 8 / 4**0.5 * b @ a
        rows = load_file(tmp_path / "fused" / WEIGHTS)[f"{module}.weight"]
        magnitudes = adapter[f"{name}.lora_magnitude_vector"]
        assert np.allclose(np.linalg.norm(rows, axis=1), magnitudes, rtol=1e-6)
        assert np.allclose(rows, magnitudes[:, None] * summed / np.linalg.norm(summed, axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("kind", ["shared weight", "full with a shared weight"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shared_weight_that_is_stored_twice_stays_the_same_in_both_places(kind, dtype, tmp_path):
    model, checkpoint = make_case(kind, tmp_path, dtype=dtype)
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    tensors = load(model / WEIGHTS)
    save(tensors | {"lm_head.weight": tensors[f"{EMBEDDINGS}.weight"].clone()}, model / WEIGHTS, {"format": "pt"})
    fused, verified = fuse_and_verify(model, checkpoint, tmp_path / "fused", TEXTS)
    after = bytes_of(tmp_path / "fused")
    assert after["lm_head.weight"] == after[f"{EMBEDDINGS}.weight"] != bytes_of(model)["lm_head.weight"]
    assert (fused.tensors, verified.passed) == (len(expected_changes(kind)) + 1, True)


def rename(old: str, new: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: [tensors.update({name.replace(old, new): tensors.pop(name)}) for name in list(tensors) if old in name]


def without(side: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if side in name]


def only(part: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part not in name]


@pytest.mark.parametrize(
    ("kind", "settings", "spoil", "message"),
    [
        ("dora", {}, without("q_proj.lora_magnitude"), "q_proj has no lora_magnitude_vector"),
        ("dora", {}, rename("q_proj.lora_magnitude_vector", "k_proj.lora_magnitude_vector"), "has only one of lora_A and lora_B"),
        ("dora", {"use_dora": False}, None, "lora_magnitude_vector is no LoRA matrix"),
        ("dora", {}, lambda t: t[f"{PREFIX}{LINEAR[0]}.lora_magnitude_vector"].fill(np.inf), "not finite"),
        (
            "dora",
            {},
            lambda t: t.update({f"{PREFIX}{LINEAR[0]}.lora_magnitude_vector": np.ones(7, np.float32)}),
            r"magnitudes \[7\], but its weight has 64 rows",
        ),
        ("embeddings and head", {"use_dora": True}, only("embed_tokens"), "DoRA of embeddings"),
        ("embeddings and head", {"r": 8}, None, r"are not \[8, in\]"),
        ("embeddings and head", {}, without("lora_embedding_A"), "has only one of lora_embedding_A and lora_embedding_B"),
        ("embeddings and head", {}, rename("model.embed_tokens", "model.layers.0.mlp.up_proj"), "matrices are those of embeddings"),
        ("embeddings and head", {}, rename(HEAD, "model.layers.0.embed_tokens"), "matrices are those of a linear layer"),
        ("embeddings and head", {"target_parameters": ["mlp.experts.gate_up_proj"]}, None, "target_parameters names"),
        ("embeddings and head", {}, rename("mlp.down_proj", "mlp.experts.0.down_proj"), r"adapter on .*experts\.0.*: .*no tensor"),
        ("shared weight", {}, without(HEAD), r"adapter on model\.embed_tokens alone: .*one tensor"),
        ("shared weight", {}, without("embed_tokens"), "adapter on lm_head alone: .*one tensor"),
        (
            "shared weight",
            {},
            lambda t: np.negative(t[f"{PREFIX}{HEAD}.lora_B.weight"], out=t[f"{PREFIX}{HEAD}.lora_B.weight"]),
            "not the same",
        ),
        ("full", {}, rename("model.norm.weight", "model.norm.scale"), r"model\.norm\.scale is \[64\], .* has no tensor"),
        ("full", {}, rename("layers.1.self_attn.k_proj", "layers.1.self_attn.q_proj"), r"is \[32, 64\], .* has \[64, 64\]"),
        ("full", {}, rename("layers.1.self_attn.k_proj", "layers.1.mlp.experts.3.up_proj"), "experts cannot be fused"),
        (
            "full",
            {},
            lambda t: t["model.norm.weight"].__setitem__(5, np.nan),
            r"model\.norm\.weight has numbers that are not finite",
        ),
        ("full", {}, lambda t: t.update({"model.norm.weight": np.ones(64, np.int8)}), "dtype I8 is not one of"),
        ("full", {}, lambda t: t.clear(), "no tensors"),
        ("full with a shared weight", {}, rename(EMBEDDINGS, HEAD), r"lm_head\.weight is .* has no tensor"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused_by_name(kind, settings, spoil, message, tmp_path):
    model, checkpoint = make_case(kind, tmp_path)
    if settings:
        edit_config(checkpoint, **settings)
    if spoil:
        edit_tensors(checkpoint / (ADAPTER if KINDS[kind][0] else WEIGHTS), spoil)
    with pytest.raises(UserError, match=message):
        fuse(model, checkpoint, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_trained_weights_are_rounded_once_to_what_the_base_stores(tmp_path):
    import torch
    from safetensors.torch import load_file as load

    model, checkpoint = make_case("full", tmp_path, dtype="bfloat16")
    fuse(model, checkpoint, tmp_path / "fused")
    fused = load(tmp_path / "fused" / WEIGHTS)
    for name, weight in load(checkpoint / WEIGHTS).items():
        assert weight.dtype == torch.float32
        assert torch.equal(fused[name], weight.bfloat16())


def test_a_training_that_rounding_outweighs_is_told_from_a_wrong_fuse_and_one_that_it_undoes_is_refused(tmp_path):
    model = make_model(tmp_path, False, dtype="bfloat16")
    short = full_checkpoint(model, tmp_path / "short", size=7e-4, names=tuple(tensor_headers(model)))
    with pytest.raises(UserError, match="by less than their stored precision rounds away"):
        fuse_and_verify(model, short, tmp_path / "fused", TEXTS)
    assert not (tmp_path / "fused").exists()
    fuse(model, short, tmp_path / "fused")
    found = verify(model, short, tmp_path / "fused", TEXTS)
    assert found.outweighed and not found.passed
    edit_tensors(short / WEIGHTS, lambda tensors: np.multiply(tensors["model.norm.weight"], 1.1, out=tensors["model.norm.weight"]))
    found = verify(model, short, tmp_path / "fused", TEXTS)
    assert not found.passed and not found.outweighed
    undone = full_checkpoint(model, tmp_path / "undone", size=1e-6)
    with pytest.raises(UserError, match="changes no weight at the precision of BF16"):
        fuse(model, undone, tmp_path / "again")


def test_a_model_is_no_checkpoint(tmp_path):
    model = make_model(tmp_path, False)
    with pytest.raises(UserError, match=r"adapter_config\.json: no such file"):
        fuse(model, model, tmp_path / "fused")


def large_embeddings(folder: Path) -> None:
    sides = {"A": np.ones((1, 1 << 16), np.float32), "B": np.ones((256, 1), np.float32)}
    tensors = {f"{PREFIX}embed_tokens.lora_embedding_{side}": numbers for side, numbers in sides.items()}
    save_file(tensors, folder / ADAPTER)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 3}))


def large_weights(folder: Path) -> None:
    save_file({"embed_tokens.weight": np.full((1 << 16, 256), 4, np.float32)}, folder / WEIGHTS)
    (folder / "progress.json").write_text("{}")


@pytest.mark.parametrize("write", [large_embeddings, large_weights])
def test_large_tensors_are_read_in_blocks(write, tmp_path):
    model, checkpoint = tmp_path / "model", tmp_path / "checkpoint"
    model.mkdir()
    checkpoint.mkdir()
    base = {"embed_tokens.weight": np.ones((1 << 16, 256), np.float16), "lm_head.weight": np.ones((2, 2), np.float16)}
    save_file(base, model / WEIGHTS)
    (model / "config.json").write_text("{}")
    write(checkpoint)
    tracemalloc.start()
    fused = fuse(model, checkpoint, tmp_path / "fused")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (load_file(tmp_path / "fused" / WEIGHTS)["embed_tokens.weight"] == 4).all()
    assert (fused.tensors, fused.dtypes) == (1, ("F16",))
    assert peak < 60 << 20  # the whole tensor is 64 MiB in float32, and it is needed several times over
