"""Token ids of a GGUF in llama.cpp are those of the tokenizer that was trained with, for every rule that is written."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf_tokenizers import BLANKS, INST, byte_level, of_pieces
from llama_cpp import opened
from tiny_models import make_tiny

from mlx_finetune.errors import UserError
from mlx_finetune.export.gguf_write import write_gguf
from mlx_finetune.models.gguf_pre import RULES, pre_tokenizer_name

TEXTS = (
    "def main() -> None:\n    return print(answer)  # 42\n\n\nif x:\n\tpass\n",
    "It's 12345, 3.14 and 0x1F; WE'LL see, don't they'Ve?",
    "naïve café Grüße 你好世界 Привет мир 🙂👩‍💻 ٣٤ ²³ Ⅷ ½",
    "  leading, trailing   \n \n\n  \t mixed \r\n blanks   ",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "x<|im_end|>y <|endoftext|> <|not_a_token|>",
    "```shell\npytest -q 2>&1 | tail -40\n```\n--------====////\\\\~~~",
    "",
)
ALPHABET = "aZé你я٣7 \n\t'.,-_<|>{}()#🙂\u200d\u0301 sStTvVrReE1290\r"


def texts() -> list[str]:
    """The ones above, and random ones of characters at which rules differ."""
    rng = random.Random(0)
    return [*TEXTS, *("".join(rng.choices(ALPHABET, k=60)) for _ in range(200))]


def _model(folder: Path, tokenizer: Any) -> Path:
    model = make_tiny("llama", folder, tokenizer=False, changes={"vocab_size": len(tokenizer)})
    tokenizer.save_pretrained(model)
    return model


@pytest.mark.parametrize("rule", RULES)
def test_llama_cpp_gives_the_ids_of_transformers(rule: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = _model(tmp_path / "model", byte_level(rule))
    assert write_gguf(model, tmp_path / "model.gguf", "f32").pre_tokenizer == rule
    tokenizer = AutoTokenizer.from_pretrained(model)
    with opened(tmp_path / "model.gguf") as llama:
        for text in texts():
            assert llama.ids(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("kind", BLANKS)
def test_llama_cpp_merges_pieces_as_transformers_does(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    whole = ["\u2581\u2581\u2581\u2581", "<table>"] if kind == "never" else []  # as Gemma has them
    model = _model(tmp_path / "model", of_pieces(tmp_path / "trained", kind, whole))
    assert write_gguf(model, tmp_path / "model.gguf", "f32").pre_tokenizer == "default"
    tokenizer = AutoTokenizer.from_pretrained(model)
    # With "first" llama.cpp has the ids of every text that begins with a control token, as the chats of this template do.
    start = "<s>" if kind == "first" else ""
    with opened(tmp_path / "model.gguf") as llama:
        for text in (start + text for text in [*texts(), "    \n        return  <table> x<|end|> y</s>z"]):
            assert llama.ids(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text
        for chat in chats():
            assert llama.ids(chat) == tokenizer(chat, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["tuned-Phi-3-mini", "mine"])
def test_tokens_that_take_the_blanks_behind_them_as_phi3s_do_so_in_llama_cpp(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = of_pieces(tmp_path / "trained", "prepended", taking=["</s>", "<|end|>", "<|user|>", "<|assistant|>"])
    model = _model(tmp_path / name, tokenizer)
    write_gguf(model, tmp_path / "model.gguf", "f32")
    loaded = AutoTokenizer.from_pretrained(model)
    with opened(tmp_path / "model.gguf") as llama:
        for text in TEXTS:
            chat = f"<s><|user|>\n{text}<|end|>\n<|assistant|>\n  {text}<|end|>\n<|endoftext|> x"
            assert llama.ids(chat) == loaded(chat, add_special_tokens=False)["input_ids"]


def test_a_model_that_is_only_called_phi3_keeps_its_own_tokens(tmp_path: Path) -> None:
    write_gguf(_model(tmp_path / "my-phi3", byte_level("gpt-2")), tmp_path / "model.gguf", "f32")
    with opened(tmp_path / "model.gguf") as llama:
        assert llama.ids("<|im_start|>  a") == byte_level("gpt-2")("<|im_start|>  a")["input_ids"]


def chats() -> list[str]:
    """As the template of these tokenizers writes them."""
    return [f"<s>[INST] {text} [/INST] {text.strip()}</s>[INST] {text} [/INST]" for text in TEXTS]


def test_pieces_whose_merges_are_not_in_the_order_of_scores_are_refused(tmp_path: Path) -> None:
    model = _model(tmp_path / "model", of_pieces(tmp_path / "trained", "never"))
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    merges = tokenizer["model"]["merges"]
    parted = next(n for n, (one, next_one) in enumerate(pairwise(merges)) if "".join(one) == "".join(next_one))
    for changed in (merges[1:], [*merges[:parted], *merges[parted + 1 :], merges[parted]]):
        path.write_text(json.dumps(tokenizer | {"model": tokenizer["model"] | {"merges": changed}}))
        with pytest.raises(UserError, match="merges otherwise than SentencePiece"):
            write_gguf(model, tmp_path / "model.gguf", "f32")


def test_blanks_that_llama_cpp_would_put_elsewhere_are_refused(tmp_path: Path) -> None:
    tokenizer = of_pieces(tmp_path / "trained", "first")
    tokenizer.chat_template = INST.replace("{{ bos_token }}", "")  # begins with text, so that both blanks and none are wrong
    with pytest.raises(UserError, match="treats blanks otherwise"):
        write_gguf(_model(tmp_path / "model", tokenizer), tmp_path / "model.gguf", "f32")


@pytest.mark.parametrize("adds", [(), ("bos",), ("bos", "eos")], ids=str)
def test_what_stands_around_a_text_is_told_to_llama_cpp(adds: tuple[str, ...], tmp_path: Path) -> None:
    tokenizer = byte_level("llama-bpe", adds)
    write_gguf(_model(tmp_path / "model", tokenizer), tmp_path / "model.gguf", "f32")
    with opened(tmp_path / "model.gguf") as llama:
        assert llama.ids("def main", special=True) == tokenizer("def main")["input_ids"]


def test_an_end_of_turn_that_llama_cpp_does_not_know_is_told_to_it(tmp_path: Path) -> None:
    from gguf import GGUFReader

    model = _model(tmp_path / "model", byte_level("gpt-2"))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0, 300]}))
    write_gguf(model, tmp_path / "model.gguf", "f32")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 300  # 0 is <|endoftext|>, which it knows
    with opened(tmp_path / "model.gguf") as llama:
        assert [token for token in range(320) if llama.library.llama_vocab_is_eog(llama.vocab, token)] == [0, 2, 300]


@pytest.mark.parametrize(
    ("pre", "whole"),
    [
        ({"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}, False),
        ({"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}, False),
        ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, True),
        (None, False),
    ],
)
def test_a_rule_that_is_not_exactly_known_is_refused(pre: Any, whole: bool) -> None:
    with pytest.raises(UserError, match="a guess would change the tokens"):
        pre_tokenizer_name({"pre_tokenizer": pre, "model": {"ignore_merges": whole}}, "model")


def test_a_token_that_takes_the_blanks_beside_it_is_refused(tmp_path: Path) -> None:
    from tokenizers import AddedToken

    tokenizer = byte_level("gpt-2")
    tokenizer.add_tokens([AddedToken("<|tool|>", rstrip=True, special=True)])
    with pytest.raises(UserError, match=r"'<\|tool\|>' takes blanks beside it"):
        write_gguf(_model(tmp_path / "model", tokenizer), tmp_path / "model.gguf", "f32")


def test_tokens_behind_the_last_row_are_left_out_where_they_are_added_ones_and_refused_where_they_are_not(tmp_path: Path) -> None:
    from gguf import GGUFReader

    tokenizer = byte_level("gpt-2")
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    model = make_tiny("llama", tmp_path / "model", tokenizer=False, changes={"vocab_size": rows})
    tokenizer.save_pretrained(model)
    write_gguf(model, tmp_path / "model.gguf", "f32")
    assert len(GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.tokens"].contents()) == rows
    short = make_tiny("llama", tmp_path / "short", tokenizer=False, changes={"vocab_size": rows - 1})
    tokenizer.save_pretrained(short)
    with pytest.raises(UserError, match=f"has the id {rows - 1}, the embeddings only {rows - 1} rows"):
        write_gguf(short, tmp_path / "short.gguf", "f32")
