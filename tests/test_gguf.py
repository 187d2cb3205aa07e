"""SmolLM2 from its GGUF: the weights that transformers reads, the ids that llama.cpp gives, a model that answers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_tokenizers import byte_level
from small_gguf import llama_of_three_tokens, write
from test_gguf_tokens import texts
from test_gguf_write import YARN
from tiny_models import make_tiny

from mlx_finetune.errors import UserError
from mlx_finetune.export.gguf_write import write_gguf
from mlx_finetune.models.gguf import find_smollm2, gguf_to_hugging_face

PROBE = "def greet(name):\n    print('Hello, ' + name)\n\nThe capital of France is"

# Found with llama_cpp 0.3.36 (special=True) on the same file. transformers' GGUF tokenizer differs on the last line.
LLAMA_CPP_IDS = {
    "def f(x):\n    return x + 1\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 1232, 216, 33, 198],
    "In 2026 there": [788, 216, 34, 32, 34, 38, 665],
    "12345, 3.14 0x1F": [33, 34, 35, 36, 37, 28, 216, 35, 30, 33, 36, 216, 32, 104, 33, 54],
    "a  b   c\t\te\n\n\n  f   ": [81, 216, 278, 256, 265, 197, 197, 85, 1116, 3805, 275, 333],
    "it's we'll I'm": [269, 506, 392, 3060, 339, 5248],
    "🙂 naïve 你好": [10813, 38887, 15486, 46494, 216, 18645, 250, 48392, 138],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
    "x<|im_end|>y <file_sep> <reponame>a": [104, 2, 105, 216, 5, 216, 4, 81],
    "²³½ ٣٤ Ⅷ 1st": [19133, 39050, 16738, 216, 164, 113, 164, 114, 216, 173, 223, 117, 216, 33, 302],
}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2).eval()


@pytest.fixture(scope="module")
def logits(model: Any, tokenizer: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(**tokenizer(PROBE, return_tensors="pt")).logits.numpy()


@pytest.mark.parametrize("text", LLAMA_CPP_IDS)
def test_the_tokenizer_gives_the_ids_of_llama_cpp_and_the_text_back(text: str, tokenizer: Any) -> None:
    assert tokenizer(text)["input_ids"] == LLAMA_CPP_IDS[text]
    assert tokenizer.decode(LLAMA_CPP_IDS[text]) == text


def test_logits_equal_those_of_the_gguf_in_transformers(logits: np.ndarray, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    gguf = find_smollm2()
    reference = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(**tokenizer(PROBE, return_tensors="pt")).logits.numpy()
    assert np.abs(logits - expected).max() < 1e-4


def test_mlx_logits_of_smollm2_equal_those_of_transformers(logits: np.ndarray, tokenizer: Any, smollm2: Path) -> None:
    import mlx.core as mx

    from mlx_finetune.engines.mlx.load import load_model

    inputs = mx.array([tokenizer(PROBE)["input_ids"]])
    assert np.abs(np.array(load_model(smollm2, "float32")(inputs)) - logits).max() < 1e-3


def test_the_converted_model_knows_the_capital_of_france(model: Any, tokenizer: Any) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id  # it also knows where to stop


def test_the_folder_says_float32_tied_and_the_theta_of_the_gguf(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["tie_word_embeddings"] is True
    assert config["rope_parameters"] == {"rope_theta": 100_000.0, "rope_type": "default"}
    assert config["rms_norm_eps"] == 1e-5
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        gguf_to_hugging_face(find_smollm2(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def small_gguf(
    path: Path,
    architecture: str = "llama",
    pre: str = "smollm",
    tensor: str = "token_embd.weight",
    more: Mapping[str, int] | None = None,
) -> Path:
    """Metadata of a Llama with one tensor and three tokens."""
    writer = llama_of_three_tokens(path, architecture, pre)
    for key, value in (more or {}).items():
        writer.add_uint32(key, value)
    write(writer, {tensor: np.zeros((2, 8), np.float32)})
    return path


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"architecture": "gptj"}, r"general\.architecture is 'gptj'; only llama, qwen2, qwen3"),
        ({"pre": "tekken"}, r"tokenizer\.ggml\.pre is 'tekken'; only gpt-2, smollm"),
        ({"tensor": "rope_freqs.weight"}, r"rope_freqs\.weight"),
        ({"tensor": "blk.0.attn_k.weight"}, r"blk\.0\.attn_k\.weight \[2, 8\] does not divide into 2 heads"),
        ({"more": {"tokenizer.ggml.eos_token_id": 7}}, r"eos_token_id is 7, of 3 tokens"),
        ({"more": {"llama.expert_count": 4}}, r"llama\.expert_count is 4"),
        ({"more": {"tokenizer.ggml.add_bos_token": 1}}, r"add_bos_token without bos_token_id"),
    ],
)
def test_what_is_not_read_is_refused_by_name_and_nothing_is_left(given: dict[str, Any], named: str, tmp_path: Path) -> None:
    gguf = small_gguf(tmp_path / "small.gguf", **given)
    with pytest.raises(UserError, match=named):
        gguf_to_hugging_face(gguf, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]


def test_a_file_that_is_not_gguf_or_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.gguf").write_text("just notes")
    with pytest.raises(UserError, match="not a GGUF file"):
        gguf_to_hugging_face(tmp_path / "notes.gguf", tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        gguf_to_hugging_face(tmp_path / "absent.gguf", tmp_path / "out")


# name -> architecture, the rule by which its tokenizer splits, keys of its config
ROUND_TRIPS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("llama", "gpt-2", {}),
    "llama 3": ("llama", "llama-bpe", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "yarn": ("llama", "smollm", {"rope_parameters": YARN}),
    "qwen2": ("qwen2", "qwen2", {"vocab_size": 400}),
    "qwen3": ("qwen3", "qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_what_is_written_as_gguf_is_read_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file
    from transformers import AutoConfig, AutoTokenizer

    architecture, rule, changes = ROUND_TRIPS[name]
    tokenizer = byte_level(rule, ("bos",) if rule == "llama-bpe" else ())
    model = make_tiny(architecture, tmp_path / "model", tokenizer=False, changes={"vocab_size": len(tokenizer)} | dict(changes))
    tokenizer.save_pretrained(model)
    write_gguf(model, tmp_path / "model.gguf", "f32")
    gguf_to_hugging_face(tmp_path / "model.gguf", tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name].view(np.uint32), after[name].view(np.uint32)) for name in before)
    configs = [AutoConfig.from_pretrained(folder).to_dict() for folder in (model, tmp_path / "back")]
    left_out = ("_name_or_path", "initializer_range", "use_cache", "transformers_version", "max_window_layers", "sliding_window")
    assert [{k: v for k, v in c.items() if k not in left_out} for c in configs[:1]] == [
        {k: v for k, v in c.items() if k not in left_out} for c in configs[1:]
    ]
    first, second = (AutoTokenizer.from_pretrained(folder) for folder in (model, tmp_path / "back"))
    for text in texts():
        assert first(text)["input_ids"] == second(text)["input_ids"], text
    assert first.get_chat_template() == second.get_chat_template()


def test_a_broken_gguf_is_refused_in_one_line(tmp_path: Path) -> None:
    data = small_gguf(tmp_path / "small.gguf").read_bytes()
    for length in (6, 24, 60, len(data) - 40):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(UserError, match="broken or cut"):
            gguf_to_hugging_face(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
