"""GGUF files run in llama.cpp: the logits of transformers, the ids of its tokenizer, the text of its chat template."""

import json
import shutil
import tracemalloc
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import library, opened
from safetensors.numpy import load_file, save_file
from test_fuse import reshard
from tiny_models import make_tiny, tiny_tokenizer

from mlx_finetune.errors import UserError
from mlx_finetune.export.gguf_write import write_gguf

PROBE = list(range(20, 116))  # 96 positions: beyond the tiny windows and the old contexts of scaled RoPE
ROPE = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
YARN = ROPE | {"rope_type": "yarn"}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "query_pre_attn_scalar": 16,
    "final_logit_softcapping": 5.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
# name -> architecture, keys of its config
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama of its own head size": ("llama", {"head_dim": 32}),
    "llama 3.1": ("llama", {"rope_parameters": ROPE | LLAMA3}),
    "llama linear": ("llama", {"rope_parameters": LINEAR}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {}),
    "smollm3": ("smollm3", {}),
    "smollm3 linear": ("smollm3", {"rope_parameters": LINEAR}),
    "smollm3 yarn": ("smollm3", {"rope_parameters": YARN}),
    "qwen2": ("qwen2", {}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2 linear": ("qwen2", {"rope_parameters": LINEAR}),
    "qwen3": ("qwen3", {}),
    "qwen3 linear": ("qwen3", {"rope_parameters": LINEAR}),
    "qwen3 yarn": ("qwen3", {"rope_parameters": YARN | {"beta_fast": 32.0}}),
    "granite": ("granite", {}),
    "granite linear": ("granite", {"rope_parameters": LINEAR}),
    "granite yarn": ("granite", {"rope_parameters": YARN}),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3 linear": ("gemma3_text", GEMMA | {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN}}),
    "phi3": ("phi3", {}),
}
# float32 summed in another order, four layers deep: 2e-5 measured. llama.cpp takes Gemma's GELU from a table in float16.
TOLERANCE = {name: 1e-4 for name in MODELS} | {"gemma3": 1e-2, "gemma3 linear": 1e-2}


def logits_of(model: Path, tokens: list[int] = PROBE) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return loaded(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    architecture, changes = MODELS[name]
    model = make_tiny(architecture, tmp_path / "model", tokenizer=True, changes=changes)
    write_gguf(model, tmp_path / "model.gguf", "f32")
    with opened(tmp_path / "model.gguf") as llama:
        found = llama.logits(PROBE)
    assert np.abs(found - logits_of(model)).max() < TOLERANCE[name]


def test_a_mistral_with_a_window_says_no_more_context_than_llama_cpp_sees_alike(tmp_path: Path) -> None:
    from gguf import GGUFReader

    model = make_tiny("mistral", tmp_path / "model", tokenizer=True, changes={"sliding_window": 64})
    write_gguf(model, tmp_path / "model.gguf", "f32")
    assert GGUFReader(tmp_path / "model.gguf").fields["llama.context_length"].contents() == 64
    with opened(tmp_path / "model.gguf") as llama:
        differences = np.abs(llama.logits(PROBE) - logits_of(model)).max(axis=1)
    assert differences[:64].max() < 1e-4 < 0.1 < differences[65:].max()


def test_a_model_in_many_files_gives_the_tensors_of_one_and_a_shared_head_is_written_once(tmp_path: Path) -> None:
    from gguf import GGUFReader

    model = make_tiny("llama", tmp_path / "model", tokenizer=True, changes={"tie_word_embeddings": True})
    reshard(model, tmp_path / "parts")
    _edit_tensors(model, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    found = []
    for name in ("model", "parts"):
        write_gguf(tmp_path / name, tmp_path / f"{name}.gguf", "f16")
        found.append({tensor.name: tensor.data for tensor in GGUFReader(tmp_path / f"{name}.gguf").tensors})
    assert found[0].keys() == found[1].keys()
    assert "output.weight" not in found[0]
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_greedy_text_and_chat_template_are_those_of_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    write_gguf(tiny_llama, tmp_path / "model.gguf", "f32")
    chat = [{"role": role, "content": f"{role} {n}\n```"} for n, role in enumerate("system system user assistant system".split())]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert _served_prompt(tmp_path / "model.gguf", chat) == prompt
    with opened(tmp_path / "model.gguf") as llama:
        ids = llama.ids(prompt)
        answer = llama.greedy(ids, 12)
    assert ids == tokenizer(prompt)["input_ids"]
    for length, token in enumerate(answer):
        assert logits_of(tiny_llama, ids + answer[:length])[-1].argmax() == token


def _served_prompt(gguf: Path, chat: list[dict[str, str]]) -> str:
    """What llama.cpp's server makes of a chat."""
    library()  # loaded in its own way, once for all
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf)
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity, settings.use_jinja = 512, 1, False, -1, True
    server = xllamacpp.Server(settings)  # ends with its last reference
    body = json.dumps({"messages": chat}).encode()
    request = urllib.request.Request(f"{server.listening_address}/apply-template", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return str(json.load(answer)["prompt"])


def test_smollm2_in_8_bits_still_knows_the_capital_of_france(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    summary = write_gguf(smollm2, tmp_path / "model.gguf", "q8_0")
    assert summary.pre_tokenizer == "smollm"
    with opened(tmp_path / "model.gguf") as llama:
        answer = llama.greedy(llama.ids("The capital of France is"), 2)
    assert AutoTokenizer.from_pretrained(smollm2).decode(answer) == " Paris."


@pytest.mark.long
def test_smollm2_in_float16_answers_word_for_word_as_in_transformers(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2).eval()
    write_gguf(smollm2, tmp_path / "model.gguf", "f16")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    with opened(tmp_path / "model.gguf") as llama:
        assert llama.greedy(prompt["input_ids"][0].tolist(), 16) == expected
    assert "Paris" in tokenizer.decode(expected)


def test_a_model_is_written_in_blocks_of_rows(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", tokenizer=True, changes={"num_hidden_layers": 1, "intermediate_size": 150_000})
    seen: list[tuple[int, int]] = []
    tracemalloc.start()
    summary = write_gguf(model, tmp_path / "model.gguf", "f16", progress=lambda done, total: seen.append((done, total)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert summary.bytes > 57e6  # and 38 MB one matrix in float32
    assert peak < 36e6
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_name_licence_base_model_and_tags_come_from_the_model_card(tiny_llama: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    model = tmp_path / "Tuned-Llama-1B"
    shutil.copytree(tiny_llama, model)
    card = "---\nlicense: apache-2.0\nbase_model: HuggingFaceTB/SmolLM2-135M\ntags:\n- gptme\n---\n# Tuned\n"
    (model / "README.md").write_text(card)
    write_gguf(model, tmp_path / "model.gguf", "f32")
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["general.name"] == "Tuned Llama 1B"
    assert fields["general.license"] == "apache-2.0"
    assert fields["general.base_model.0.name"] == "SmolLM2 135M"
    assert fields["general.tags"] == ["gptme"]


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_tensors(model: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def _cut(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-100])


def _other_tokenizer(model: Path, **changes: Any) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | changes))


def _set(name: str, value: float) -> Callable[[Path], None]:
    return lambda model: _edit_tensors(model, lambda tensors: tensors[name].__setitem__((0, 0), value))


DAMAGE: Mapping[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (_cut, r"cut|promises|ends at"),
    "no config": (lambda m: (m / "config.json").unlink(), "no such file"),
    "unknown architecture": (lambda m: _edit(m / "config.json", model_type="gptj"), "no GGUF of architecture 'gptj'"),
    "AWQ": (lambda m: _edit(m / "config.json", quantization_config={"quant_method": "awq"}), "are quantised"),
    "MLX": (lambda m: _edit(m / "config.json", quantization={"bits": 4, "group_size": 64}), "are quantised"),
    "other activation": (lambda m: _edit(m / "config.json", hidden_act="gelu"), "hidden_act is 'gelu'"),
    "YaRN of other betas": (
        lambda m: _edit(m / "config.json", rope_parameters=ROPE | {"rope_type": "yarn", "beta_slow": 2.0}),
        "beta_slow",
    ),
    "dynamic RoPE": (lambda m: _edit(m / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "rope_type"),
    "no tensor": (lambda m: _edit_tensors(m, lambda t: t.pop("model.layers.2.mlp.up_proj.weight")), "blk.2.ffn_up.weight"),
    "another tensor": (lambda m: _edit_tensors(m, lambda t: t.update(extra=np.ones(2, np.float32))), "tensor extra"),
    "another size": (lambda m: _edit(m / "config.json", num_key_value_heads=4), "attn_k.weight is"),
    "not finite": (_set("model.layers.0.mlp.up_proj.weight", np.nan), "blk.0.ffn_up.weight has .* not finite"),
    "too large": (_set("model.layers.0.mlp.up_proj.weight", 1e30), "F16 cannot hold"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "no tokenizer.json"),
    "a broken tokenizer": (lambda m: (m / "tokenizer.json").write_text("{}"), "no vocabulary"),
    "a cut tokenizer": (lambda m: (m / "tokenizer.json").write_text('{"model"'), "not JSON"),
    "unknown rule": (lambda m: _other_tokenizer(m, pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    "unknown normalizer": (lambda m: _other_tokenizer(m, normalizer={"type": "Lowercase"}), "normalizer"),
    "a broken card": (lambda m: (m / "README.md").write_text("---\na: [1\n---\n"), "README.md's front matter"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_cannot_be_written_is_refused_in_one_line_and_nothing_is_left(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    shutil.copytree(tiny_llama, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=message) as refused:
        write_gguf(tmp_path / "model", tmp_path / "out.gguf", "f16")
    assert "\n" not in refused.value.message
    assert refused.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_existing_file_is_left_alone_and_an_unknown_kind_named(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_gguf(tiny_llama, tmp_path / "out.gguf", "f16")
    assert (tmp_path / "out.gguf").read_text() == "mine"
    with pytest.raises(UserError, match="'q3' is none of f32"):
        write_gguf(tiny_llama, tmp_path / "new.gguf", "q3")


def test_a_gemma_of_another_pattern_of_windows_is_refused(tmp_path: Path) -> None:
    model = make_tiny("gemma3_text", tmp_path / "model", tokenizer=True)
    with pytest.raises(UserError, match="layer_types"):
        write_gguf(model, tmp_path / "out.gguf", "f16")


def test_rows_of_embeddings_without_a_token_become_unused_ones(tmp_path: Path) -> None:
    from gguf import GGUFReader

    model = make_tiny("llama", tmp_path / "model", tokenizer=True, changes={"vocab_size": 330})
    write_gguf(model, tmp_path / "model.gguf", "f32")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    known = len(tiny_tokenizer())
    assert fields["tokenizer.ggml.tokens"].contents()[known:] == [f"[PAD{n}]" for n in range(known, 330)]
    assert set(fields["tokenizer.ggml.token_type"].contents()[known:]) == {5}
    with opened(tmp_path / "model.gguf") as llama:
        assert np.abs(llama.logits(PROBE) - logits_of(model)).max() < 1e-4
