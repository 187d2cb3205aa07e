"""A converted folder computes what the original computes, in every library that reads it, or it is not there at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_architectures import RELATIVE, SCALING, rope, tokens, transformers_logits
from tiny_models import make_tiny, rewrite_as_v4

from mlx_finetune.errors import UserError
from mlx_finetune.export.convert import Converted, How, convert
from mlx_finetune.export.distance import VerificationError
from mlx_finetune.export.verify_converted import Compared, verify_converted
from mlx_finetune.models.importing import find_source
from mlx_finetune.models.mlx_proven import PROVEN
from mlx_finetune.models.quantisation import RECIPES, Quantisation, quantisation_of
from mlx_finetune.models.weights import tensor_headers

FOUR = Quantisation(4, 32)
UNCHECKED = How(verify=False)


def converted(model: Path, out: Path, how: How = UNCHECKED) -> Converted:
    return convert(find_source(str(model)), out, how, lambda done, total: None)


def plain_mlx_logits(folder: Path, inputs: np.ndarray) -> np.ndarray:
    """By mlx-lm, which is told nothing but the folder."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(inputs)))


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


def arrays(folder: Path) -> dict[str, Any]:
    import mlx.core as mx

    found: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        found |= mx.load(str(file))
    return found


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def change_config(folder: Path, **values: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | values))


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bfloat16 with eight layers, in three files, as transformers 4 wrote it."""
    folder = tmp_path_factory.mktemp("half")
    made = make_tiny("llama", folder / "one", tokenizer=True, dtype="bfloat16", style="v4", changes={"num_hidden_layers": 8})
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(made).save_pretrained(folder / "model", max_shard_size="220KB")
    for file in made.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder / "model" / file.name)
    assert len(list((folder / "model").glob("model-*-of-00003.safetensors"))) == 3
    return folder / "model"


@pytest.mark.parametrize("style", ["v4", "v5"])
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"tie_word_embeddings": True} | rope("llama", SCALING["llama3"])),
        ("qwen2", rope("qwen2")),
        ("gemma3_text", rope("gemma3_text", SCALING["linear"])),
        ("exaone4", rope("exaone4")),
        ("qwen3_moe", rope("qwen3_moe")),
    ],
)
def test_mlx_lm_and_transformers_read_a_converted_folder_as_the_original(
    model_type: str, changes: dict[str, Any], style: str, tmp_path: Path
) -> None:
    model = make_tiny(model_type, tmp_path / "model", tokenizer=True, changes=changes)
    expected = transformers_logits(model, tokens(48))
    if style == "v4":
        rewrite_as_v4(model / "config.json")
    made = converted(model, tmp_path / "out", How())
    assert apart(plain_mlx_logits(tmp_path / "out", tokens(48)), expected) < RELATIVE
    assert apart(transformers_logits(tmp_path / "out", tokens(48)), expected) == 0
    assert (
        made.verified
        and made.verified.read_by_mlx_lm
        and made.verified.differences.keys()
        == {
            "made_in_mlx",
            "made_in_transformers",
        }
    )
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


# mlx_lm.load refuses some (names of kinds, of layers or of packed experts that transformers writes), and of the others its own
# forward pass is another one: GELU (gemma, gpt_neox, starcoder2). `convert` says so, and we compute them as transformers does.
NOT_ALONE = frozenset("gemma gpt_neox starcoder2 gpt_oss granitemoehybrid mpt qwen3_5_moe_text qwen3_5_text".split())
NOT_IN_BFLOAT16 = frozenset({"qwen3_next"})  # of such weights, unpacked, its own forward pass is far off: half the largest logit


@pytest.mark.long
@pytest.mark.parametrize("model_type", sorted(PROVEN))
def test_every_proven_architecture_is_converted_exactly_and_it_is_known_what_mlx_lm_reads(model_type: str, tmp_path: Path) -> None:
    sizes = {"intermediate_size": 256 if model_type == "gpt_neox" else 64}  # what groups of 32 divide
    sizes |= {"moe_intermediate_size": 64} if model_type == "qwen3_moe" else {}
    model = make_tiny(model_type, tmp_path / "model", tokenizer=True, changes=rope(model_type) | sizes)
    for i, how in enumerate((How(), How(dtype="bfloat16"), How(FOUR), How(Quantisation(4, 32, "mxfp4"), dtype="bfloat16"))):
        made = converted(model, tmp_path / str(i), how)
        assert made.verified and made.verified.passed
        if model_type not in NOT_ALONE or how == How():
            halved = model_type in NOT_IN_BFLOAT16 and how == How(dtype="bfloat16")
            assert made.verified.read_by_mlx_lm == (model_type not in NOT_ALONE and not halved)


MLX_LM: dict[str, tuple[Quantisation, dict[str, Any]]] = {
    "4 bits": (FOUR, {"q_bits": 4, "q_group_size": 32}),
    "8 bits": (Quantisation(8, 64), {"q_bits": 8}),
    "mxfp4": (Quantisation(4, 32, "mxfp4"), {"q_mode": "mxfp4"}),
    "nvfp4": (Quantisation(4, 16, "nvfp4"), {"q_mode": "nvfp4"}),
    **{
        name: (Quantisation(RECIPES[name][0], 32, "affine", name), {"q_group_size": 32, "quant_predicate": name})
        for name in RECIPES
    },
}


@pytest.mark.parametrize("kind", MLX_LM)
def test_quantised_arrays_are_those_of_mlx_lm_bit_for_bit(kind: str, half: Path, tmp_path: Path) -> None:
    ours, theirs = MLX_LM[kind]
    same_as_mlx_lm(half, tmp_path, ours, theirs)
    if kind == "mixed_3_6":  # v_proj and down_proj of the first and last eighth and of every third layer, and the head
        bits = {name: how["bits"] for name, how in config_of(tmp_path / "ours")["quantization"].items() if isinstance(how, dict)}
        assert [i for i in range(8) if bits[f"model.layers.{i}.mlp.down_proj"] == 6] == [0, 3, 6, 7]
        assert (bits["lm_head"], bits["model.embed_tokens"], bits["model.layers.0.self_attn.q_proj"]) == (6, 3, 3)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_stacks_of_experts_and_their_routers_are_those_of_mlx_lm_bit_for_bit(model_type: str, tmp_path: Path) -> None:
    sizes = {"intermediate_size": 64, "moe_intermediate_size": 64} if model_type == "qwen3_moe" else {"intermediate_size": 64}
    made = make_tiny(model_type, tmp_path / "model", tokenizer=True, dtype="bfloat16", style="v4", changes=sizes)
    converted(made, model := tmp_path / "plain")  # so that mlx-lm can read its config.json
    same_as_mlx_lm(model, tmp_path, FOUR, {"q_bits": 4, "q_group_size": 32})
    if model_type == "qwen3_moe":  # whose class asks for 8 bits
        assert config_of(tmp_path / "ours")["quantization"]["model.layers.0.mlp.gate"] == {"group_size": 64, "bits": 8}
        with_recipe = How(Quantisation(3, 32, "affine", "mixed_3_6"), verify=False)
        converted(model, tmp_path / "mixed", with_recipe)
        assert config_of(tmp_path / "mixed")["quantization"]["model.layers.0.mlp.gate"]["bits"] == 8


def same_as_mlx_lm(model: Path, folder: Path, ours: Quantisation, theirs: dict[str, Any]) -> None:
    from mlx_lm.convert import convert as convert_with_mlx_lm

    convert_with_mlx_lm(str(model), str(folder / "theirs"), quantize=True, **theirs)
    converted(model, folder / "ours", How(ours, shard_size=100_000, verify=False))
    expected, found = arrays(folder / "theirs"), arrays(folder / "ours")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and np.array_equal(*(np.array(a.view(np_view(a))) for a in (found[name], value))), (
            name
        )
    sizes = [sum(t.end - t.start for t in tensor_headers_of(file)) for file in (folder / "ours").glob("*.safetensors")]
    assert len(sizes) > 1 and max(sizes) <= 100_000
    said, written = (config_of(folder / name)["quantization"] for name in ("theirs", "ours"))
    whole = {"bits", "group_size", "mode"}
    assert {k: v for k, v in said.items() if k not in whole} == {k: v for k, v in written.items() if k not in whole}
    assert config_of(folder / "ours")["quantization_config"] == written


def np_view(array: Any) -> Any:
    """Integers of the same width: numpy has no bfloat16."""
    import mlx.core as mx

    return {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size]


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_quantising_holds_a_few_tensors_and_never_the_model(model_type: str, tmp_path: Path) -> None:
    import mlx.core as mx

    sizes = {"num_hidden_layers": 16, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_experts": 8}
    model = make_tiny(model_type, tmp_path / "model", tokenizer=True, dtype="bfloat16", changes=sizes)
    tensors = tensor_headers(model).values()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    converted(model, tmp_path / "out", How(FOUR, verify=False))
    assert mx.get_peak_memory() - before < 0.1 * sum(tensor.end - tensor.start for tensor in tensors)


def tensor_headers_of(file: Path) -> list[Any]:
    from mlx_finetune.models.weights import file_headers

    return list(file_headers(file).values())


@pytest.mark.parametrize("kind", ["4 bits", "mxfp4", "mixed_4_6"])
def test_a_quantised_folder_computes_with_exactly_what_its_packed_weights_stand_for(kind: str, half: Path, tmp_path: Path) -> None:
    from mlx_lm import load
    from mlx_lm.utils import dequantize_model

    made = converted(half, tmp_path / "out", How(MLX_LM[kind][0]))
    assert made.verified and made.verified.passed and made.verified.read_by_mlx_lm
    assert made.verified.differences.keys() == {"original_in_mlx", "packed"} and made.verified.reference.startswith("transformers")
    assert 0.001 < made.verified.relative_error < 2 and 0 < made.verified.kl < 2  # seen, and not another model
    # Unpacked by mlx-lm and computed by transformers: it is the same model.
    import mlx.core as mx

    model, tokenizer = load(str(tmp_path / "out"))
    assert tokenizer.chat_template
    model.set_dtype(mx.float32)
    weights = {name: np.array(value.astype(mx.float32)) for name, value in flat(dequantize_model(model)).items()}
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    save_file(weights, unpacked / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(half / "config.json", unpacked)
    assert apart(plain_mlx_logits(tmp_path / "out", tokens(24)), transformers_logits(unpacked, tokens(24))) < RELATIVE


@pytest.mark.parametrize("wrong", ["scales of another layer", "one weight", "a norm"])
def test_a_packed_folder_with_a_weight_of_its_own_is_found(wrong: str, half: Path, tmp_path: Path) -> None:
    converted(half, tmp_path / "out", How(FOUR, verify=False))
    what = Compared(half, half, tmp_path / "out", True, None, whole=False)
    verified, _ = verify_converted(what, None)
    assert verified.passed and verified.weights is not None and 0.3 < verified.weights < 0.8
    where = tensor_headers(tmp_path / "out")
    file = bytearray(where["lm_head.weight"].file.read_bytes())
    first, other, norm = (where[f"model.{n}"] for n in (f"layers.{FIRST}", f"layers.{OTHER}", "norm.weight"))
    if wrong == "scales of another layer":
        file[first.start : first.end] = file[other.start : other.end]
    else:
        place = norm.start if wrong == "a norm" else where["model.layers.2.mlp.up_proj.weight"].start + 40
        file[place + 1] ^= 0x48
    where["lm_head.weight"].file.write_bytes(file)
    with pytest.raises(VerificationError, match="as far from the original's as they may"):
        verify_converted(what, None)


FIRST, OTHER = "0.self_attn.q_proj.scales", "1.self_attn.q_proj.scales"


def flat(model: Any) -> dict[str, Any]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(model.parameters()))


@pytest.mark.parametrize(("stored", "wanted"), [("bfloat16", "float16"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_another_dtype_is_rounded_to_once_and_shards_stay(stored: str, wanted: str, half: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file as load_torch

    model = half
    if stored == "float32":
        model = tmp_path / "wide"
        converted(half, model, How(dtype="float32", verify=False))
    made = converted(model, tmp_path / "out", How(dtype=wanted))
    assert made.verified and made.verified.passed
    files = sorted(path.name for path in model.glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == files and len(files) == 3
    for name in files:
        before, after = load_torch(model / name), load_torch(tmp_path / "out" / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(value.to(getattr(torch, wanted)), after[key]) for key, value in before.items())
    assert {config_of(tmp_path / "out")[key] for key in ("dtype", "torch_dtype")} == {wanted}


def test_what_has_the_dtype_already_keeps_its_bytes(half: Path, tmp_path: Path) -> None:
    converted(half, tmp_path / "out", How(dtype="bfloat16", verify=False))
    for name, location in tensor_headers(half).items():
        other = tensor_headers(tmp_path / "out")[name]
        assert read(location) == read(other), name


def read(location: Any) -> bytes:
    return location.file.read_bytes()[location.start : location.end]


def test_a_number_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", tokenizer=True)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = 70_000.0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight: 70000 is more than F16 holds"):
        converted(model, tmp_path / "out", How(dtype="float16"))
    assert left(tmp_path) == {"model"}


def test_dtype_with_bits_is_of_scales_and_of_what_is_not_quantised(half: Path, tmp_path: Path) -> None:
    converted(half, tmp_path / "out", How(FOUR, dtype="float16", verify=False))
    dtypes = {name: location.dtype for name, location in tensor_headers(tmp_path / "out").items()}
    assert {dtypes[f"lm_head.{part}"] for part in ("scales", "biases")} == {"F16"} == {dtypes["model.norm.weight"]}
    assert dtypes["lm_head.weight"] == "U32"


@pytest.mark.parametrize("how", [How(), How(FOUR), How(dtype="float16")])
def test_a_model_that_mlx_computes_otherwise_is_never_left_in_place(how: How, tmp_path: Path) -> None:
    # transformers clips queries, keys and values of olmoe; mlx-lm's class does not read the setting
    make_tiny("olmoe", tmp_path / "model", tokenizer=True, changes={"clip_qkv": 0.5, "intermediate_size": 64})
    with pytest.raises(UserError, match="computes something else than transformers") as error:
        converted(tmp_path / "model", tmp_path / "out", how)
    assert "--engine torch" in error.value.hint
    assert left(tmp_path) == {"model"}


def test_everything_beside_the_weights_is_copied_but_code(half: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(half, model)
    kept = {"LICENSE": "Apache", "NOTICE.txt": "so", "README.md": "# card", "generation_config.json": '{"eos_token_id": [2, 5]}'}
    for name, text in {**kept, "modeling_x.py": "raise SystemExit", "training_args.bin": "pickle", ".secret": "x"}.items():
        (model / name).write_text(text)
    change_config(model, auto_map={"AutoModel": "modeling_x.Model"})
    converted(model, tmp_path / "out")
    names = left(tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_text() for name in kept} == kept
    assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "origin.json"}
    assert not names & {"modeling_x.py", "training_args.bin", ".secret"} and "auto_map" not in config_of(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("how", [How(), How(FOUR)])
def test_files_of_any_name_are_read_as_the_index_says(how: How, half: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(half, model)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    for file in sorted(model.glob("model-*.safetensors")):
        file.rename(model / file.name.replace("model-", "part_"))
    index["weight_map"] = {name: file.replace("model-", "part_") for name, file in index["weight_map"].items()}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(model / "part_00001-of-00003.safetensors", model / "model-old.safetensors")  # which mlx-lm would merge
    made = converted(model, tmp_path / "out", how)
    assert made.verified and made.verified.passed


BROKEN: dict[str, tuple[str, str]] = {
    "cut": ("model-00002-of-00003.safetensors", r"cut at byte"),
    "gone": ("model-00002-of-00003.safetensors", r"model-00002-of-00003\.safetensors"),
    "swapped": ("model-00002-of-00003.safetensors", r"is not in|is both in"),
    "tokenizer": ("tokenizer.json", "no tokenizer"),
    "config": ("config.json", "no config.json"),
    "other": ("config.json", "not loadable with MLX"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_damaged_checkpoint_is_refused_by_name_and_nothing_is_left(kind: str, half: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(half, model)
    name, said = BROKEN[kind]
    if kind == "cut":
        (model / name).write_bytes((model / name).read_bytes()[:-7])
    elif kind == "swapped":
        shutil.copy(model / "model-00003-of-00003.safetensors", model / name)
    elif kind == "other":
        change_config(model, intermediate_size=128)
    else:
        (model / name).unlink()
    for how in (How(FOUR), How(), UNCHECKED):
        with pytest.raises(UserError, match=said) as error:
            converted(model, tmp_path / "out", how)
        assert error.value.hint
        assert left(tmp_path) == {"model"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((7, None, "", ""), "--bits 7: MLX has 2, 3, 4, 5, 6, 8"),
        ((4, 48, "", ""), "--group-size 48: MLX has 32, 64, 128"),
        ((None, 64, "", ""), "--group-size 64 without --bits"),
        ((None, None, "affine", ""), "--mode affine without --bits"),
        ((4, None, "int4", ""), "--mode int4: MLX has affine, mxfp4, nvfp4, mxfp8"),
        ((8, None, "mxfp4", ""), "--bits 8: mxfp4 has 4"),
        ((None, 64, "nvfp4", ""), "--group-size 64: nvfp4 has 16"),
        ((4, None, "", "mixed_3_6"), "--recipe mixed_3_6 and --bits 4 do not go together"),
        ((None, None, "mxfp4", "mixed_3_6"), "--recipe mixed_3_6 and --mode mxfp4 do not go together"),
        ((None, None, "", "mixed_9"), "--recipe mixed_9: MLX has mixed_2_6"),
    ],
)
def test_what_mlx_cannot_pack_is_refused_before_anything_is_read(given: tuple[Any, ...], said: str) -> None:
    with pytest.raises(UserError) as error:
        quantisation_of(*given)
    assert error.value.message.startswith(said) and error.value.hint


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_count_of_bits_packs_and_unpacks(bits: int, tiny_llama: Path, tmp_path: Path) -> None:
    made = converted(tiny_llama, tmp_path / "out", How(quantisation_of(bits, 32, "", ""), verify=False))
    assert bits < made.bits_per_weight < bits + 2.5  # scale and bias in float32 for 32 weights: 2 bits, and the norms
    assert np.isfinite(plain_mlx_logits(tmp_path / "out", tokens(8))).all()


def test_a_width_that_no_group_divides_is_left_as_it_is_or_refused_where_all_are(tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 12}
    model = make_tiny("llama", tmp_path / "model", tokenizer=True, changes=sizes)
    made = converted(model, tmp_path / "out", How(FOUR))
    assert "model.layers.0.self_attn.q_proj" in made.left_alone and "model.layers.0.mlp.down_proj" not in made.left_alone
    assert made.verified and made.verified.passed
    with pytest.raises(UserError, match="no layer has a width that groups of 128 divide"):
        converted(model, tmp_path / "none", How(Quantisation(4, 128)))


METHODS = {
    "GPTQ (4 bits)": {"quant_method": "gptq", "bits": 4},
    "fp8 in blocks": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "fp8 per tensor": {"quant_method": "fp8"},
    "bitsandbytes (4 bits)": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "compressed-tensors (pack-quantized)": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "AWQ (4 bits, gemv)": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"},
    "newest": {"quant_method": "newest"},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_that_is_quantised_in_another_way_is_refused_by_name(name: str, half: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(half, model)
    change_config(model, quantization_config=METHODS[name])
    (model / "README.md").write_text("---\nlicense: mit\nbase_model:\n- org/original\n---\n# card\n")
    with pytest.raises(UserError) as error:
        converted(model, tmp_path / "out", How(FOUR))
    assert f"quantised with {name}, which MLX does not read exactly" in error.value.message
    assert error.value.hint == "use the original checkpoint org/original, and --bits"


def test_a_model_that_mlx_lm_quantised_is_not_quantised_again(half: Path, tmp_path: Path) -> None:
    converted(half, tmp_path / "four", How(FOUR, verify=False))
    with pytest.raises(UserError, match="mlx-lm quantised it already"):
        converted(tmp_path / "four", tmp_path / "out", How(FOUR))
