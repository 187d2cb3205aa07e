"""A SentencePiece model becomes a tokenizer that gives sentencepiece's own ids, and the text back."""

import base64
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from numpy.random import default_rng as random_generator
from tiny_replit import CODE, PIECES, SPECIAL, TOKENIZER, TRAP, lines, sources, train_spiece, write
from tokenizers import Tokenizer

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError
from mlx_finetune.models.sentencepiece_model import read_sentencepiece
from mlx_finetune.models.spiece import spiece_to_tokenizer

ODD = (
    "", " ", "  ", "\n", "\t", "   foo", "     x", "\t\tif x:\n\t\t\treturn", "a  b   c    d", " " * 17 + "def f():\n" + " " * 8,
    "trailing   ", "return  1\n\n\n", "\r\n x\r\n", "naïve café 你好 🙂🙃", "\u00a0x\u3000y ﬁ ½ Ⅷ ﷺ", "é e\u0301", "👨‍👩‍👧 🇩🇪 ‍",
    "▁x▁▁y", "한국어 עברית العربية", "\x01\x7f", "A" * 50, "\u200bzero\ufeff", "<0x0A", "### Instruction:\nx\n\n### Response:",
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "replit": SPECIAL,
    "sentencepiece's own": {},
    "rules": {"normalization_rule_name": "nfkc_cf"},
    "identity, dummy prefix": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "symbols of the user's": SPECIAL | {"user_defined_symbols": ["▁▁", "▁▁▁▁", "▁▁▁▁▁▁▁▁", "\t", "\n", "<sep>", "éé"]},
    "bytes": {"byte_fallback": True, "vocab_size": 600, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
}
F32 = 1e-2  # of the log probability of a text of 6,000 characters, about -10,000, which sentencepiece adds up in float32


def texts() -> list[str]:
    """Lines of code, whole files, and what is odd."""
    return [*random.Random(0).sample(lines(), 400), *(text[:6000] for text in sources()), *ODD]


@pytest.mark.parametrize("name", OPTIONS)
def test_ids_are_those_of_sentencepiece_and_give_the_text_back(name: str, tmp_path: Path) -> None:
    path = train_spiece(tmp_path / "spiece.model", **OPTIONS[name])
    spiece_to_tokenizer(path, tmp_path)
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=str(path)), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    pieces, scores = read_sentencepiece(path).pieces, dict(json.loads(ours.to_str())["model"]["vocab"])
    ours.encode_special_tokens = True  # as contents of messages are encoded
    back = ties = 0
    for text in texts():
        expected, found = theirs.encode(text), ours.encode(text, add_special_tokens=False).ids
        if expected != found:  # two ways to cut it that are as probable
            ties += 1
            mine, other = (sum(scores[pieces[number].text] for number in ids) for ids in (found, expected))
            assert other - 1e-9 <= mine <= other + F32, text
        if theirs.decode(expected) == text:
            assert ours.decode(found) == text
            back += 1
    assert ties < 0.02 * len(texts())
    assert back > (0.9 * len(texts()) if "identity" in OPTIONS[name].get("normalization_rule_name", "") else 10)


def test_texts_that_look_like_special_tokens_stay_texts(tmp_path: Path) -> None:
    for name in ("replit", "bytes", "sentencepiece's own"):
        folder = tmp_path / name
        folder.mkdir()
        model = train_spiece(folder / "spiece.model", **OPTIONS[name])
        spiece_to_tokenizer(model, folder)
        ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
        text = "a <|endoftext|>b<|pad|><|unk|></s><unk> <0x0A>"
        ours.encode_special_tokens = True
        plain = ours.encode(text, add_special_tokens=False).ids
        kinds = {read_sentencepiece(model).pieces[number].kind for number in plain}
        assert ours.decode(plain) == text and kinds == {1}  # pieces of text alone
        ours.encode_special_tokens = False
        end = "<|endoftext|>" if name == "replit" else "</s>"
        assert ours.encode(text, add_special_tokens=False).ids.count(ours.token_to_id(end)) == 1


def replit_files(folder: Path, **changes: Any) -> Path:
    """The files of a tokenizer as Replit-v2 has them."""
    folder.mkdir(exist_ok=True)
    write(folder / "tokenizer_config.json", {**TOKENIZER, **changes})
    write(folder / "added_tokens.json", {"<s>": PIECES})
    write(folder / "config.json", {"model_type": "mpt"})
    for name in CODE:
        (folder / name).write_text(TRAP)
    return train_spiece(folder / "spiece.model", **SPECIAL)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replit")
    out = folder / "out"
    out.mkdir()
    spiece_to_tokenizer(replit_files(folder / "in"), out)
    return out


def test_special_tokens_have_the_ids_of_replit_and_no_code_is_named(converted: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted, local_files_only=True)
    assert (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (0, 1, 2, PIECES)
    assert (tokenizer.eos_token, tokenizer.bos_token, len(tokenizer)) == ("<|endoftext|>", "<s>", PIECES + 1)
    config = json.loads((converted / "tokenizer_config.json").read_text())
    assert not {"auto_map", "sp_model_kwargs"} & config.keys() and config["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "def f(x):\n    return  x\n"
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(converted.parent / "in" / "spiece.model"))
    assert tokenizer(text)["input_ids"] == theirs.encode(text)
    assert tokenizer.decode([*theirs.encode(text), 1]) == f"{text}<|endoftext|>"
    assert tokenizer.decode([*theirs.encode(text), 1], skip_special_tokens=True) == text


def test_where_no_file_names_special_tokens_they_are_those_of_the_model(tmp_path: Path) -> None:
    spiece_to_tokenizer(train_spiece(tmp_path / "spiece.model", **SPECIAL), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert {key: config.get(key) for key in ("unk_token", "eos_token", "pad_token", "bos_token")} == {
        "unk_token": "<|unk|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "bos_token": None,
    }  # fmt: skip
    write(tmp_path / "tokenizer_config.json", {"pad_token": None})
    spiece_to_tokenizer(tmp_path / "spiece.model", tmp_path)
    assert "pad_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_a_template_of_its_own_stays(tmp_path: Path) -> None:
    own = replit_files(tmp_path / "in", chat_template="{{ messages[0].content }}")
    spiece_to_tokenizer(own, tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages[0].content }}"
    (tmp_path / "in" / "config.json").unlink()  # nothing says that it is an MPT
    write(tmp_path / "in" / "tokenizer_config.json", TOKENIZER)
    spiece_to_tokenizer(own, tmp_path)
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


CHAT = (
    *(Message("system", text) for text in ("You are gptme.", "The date is known.")),
    *(Message("user", "list the files"), Message("assistant", "I look.\n\n```shell\nls\n```"), Message("system", "a.py\n    b.py")),
    *(
        Message("assistant", "Two files."),
        Message("user", "why"),
        Message("user", "tell me"),
        Message("assistant", "def f():\n    1"),
    ),
    *(Message("system", "note"), Message("system", "more"), Message("assistant", "Done.")),
)


def test_the_template_of_instructions_renders_a_chat_of_gptme_and_every_answer_is_learned_once(converted: Path) -> None:
    template = ChatTemplate.load(converted)
    assert template.policy.name == "as they are" or not template.policy.jinja, template.why
    assert template.render(CHAT[:4]) == (
        "You are gptme.\n\nThe date is known.\n\n### Instruction:\nlist the files\n\n"
        "### Response:I look.\n\n```shell\nls\n```<|endoftext|>\n\n"
    )
    assert template.render(CHAT).count("### Input:\n") == 3
    assert template.render(CHAT[:3], generation_prompt=True).endswith("### Instruction:\nlist the files\n\n### Response:")
    encoded = template.encode(CHAT)
    learned = [int(token) for token, weight in zip(encoded.tokens, encoded.weights, strict=True) if weight > 0]
    answers = [message.content for message in CHAT if message.role == "assistant"]
    text = template.special.decode(learned, skip_special_tokens=False)
    assert text == "".join(f"{answer}<|endoftext|>" for answer in answers)
    assert template.special.decode(encoded.tokens.tolist(), skip_special_tokens=False) == template.render(CHAT)


def test_each_answer_stands_behind_the_very_tokens_of_its_prompt(converted: Path) -> None:
    template = ChatTemplate.load(converted)
    for place, message in enumerate(CHAT):
        if message.role == "assistant":
            encoded = template.encode_turn(CHAT[: place + 1])
            prompt = template.prompt(CHAT[:place])
            assert encoded.tokens[: len(prompt)].tolist() == prompt.tolist()
            assert not encoded.weights[: len(prompt)].any() and encoded.weights[len(prompt) :].sum() > 1


def test_prepare_renders_every_answer_exactly_once(converted: Path, tmp_path: Path) -> None:
    from mlx_finetune.config import make_config
    from mlx_finetune.data.conversation import Conversation, write_conversations
    from mlx_finetune.data.dataset import Dataset
    from mlx_finetune.data.prepare import prepare

    last = [(Message("user", f"and {i}?"), Message("assistant", f"I {i}.")) for i in range(4)]
    chats = [Conversation((*CHAT, *turns), "gptme", f"log-{i}", "MIT") for i, turns in enumerate(last)]
    write_conversations(tmp_path / "c.jsonl", chats)
    template = ChatTemplate.load(converted)
    prepare([tmp_path / "c.jsonl"], template, make_config({}, "test"), tmp_path / "data", {})
    dataset = Dataset.open(tmp_path / "data")
    examples = [store[index] for store in (dataset.train, dataset.valid) for index in range(len(store))]
    learned = [template.special.decode(one.tokens[one.weights > 0].tolist(), skip_special_tokens=False) for one in examples]
    answers = "".join(f"{message.content}<|endoftext|>" for message in CHAT if message.role == "assistant")
    assert sorted(learned) == sorted(f"{answers}I {i}.<|endoftext|>" for i in range(4))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "bpe"}, "BPE and not Unigram"),
        ({"model_type": "char"}, "character and not Unigram"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({"normalization_rule_name": "nmt_nfkc"}, "symbols of the user's that its rules change"),  # a tab becomes a blank
    ],
)
def test_what_tokenizers_would_do_otherwise_is_refused_by_name(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        spiece_to_tokenizer(train_spiece(tmp_path / "spiece.model", **SPECIAL | changes), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["spiece.model"]


def test_tokens_without_an_id_and_holes_between_ids_are_refused(tmp_path: Path) -> None:
    path = replit_files(tmp_path / "in")
    write(tmp_path / "in" / "added_tokens.json", {"<s>": PIECES + 1})
    with pytest.raises(UserError, match="added tokens do not follow each other from id 400: '<s>' has the id 401"):
        spiece_to_tokenizer(path, tmp_path)
    write(tmp_path / "in" / "added_tokens.json", {"<s>": PIECES})
    write(tmp_path / "in" / "config.json", {"model_type": "mpt", "vocab_size": PIECES})  # no embedding for <s>
    spiece_to_tokenizer(path, tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == PIECES
    assert "bos_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    write(tmp_path / "in" / "config.json", {"model_type": "mpt", "vocab_size": PIECES + 1})
    (tmp_path / "in" / "added_tokens.json").unlink()
    with pytest.raises(UserError, match="special token '<s>' is neither in"):
        spiece_to_tokenizer(path, tmp_path)
    decoder = {str(PIECES): {"content": "<s>", "special": True}, "1": {"content": "<|endoftext|>", "special": True}}
    write(tmp_path / "in" / "tokenizer_config.json", {**TOKENIZER, "added_tokens_decoder": decoder})
    spiece_to_tokenizer(path, tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id("<s>") == PIECES


def test_every_cut_of_the_file_is_refused_or_read_whole(tmp_path: Path) -> None:
    whole = train_spiece(tmp_path / "whole.model").read_bytes()
    model, path = read_sentencepiece(tmp_path / "whole.model"), tmp_path / "spiece.model"
    assert model.charsmap and base64.b64encode(model.charsmap) and len(model.pieces) == PIECES
    for end in [0, 1, 2, *range(3, len(whole), 5003), len(whole) - 1]:
        path.write_bytes(whole[:end])
        try:
            part = read_sentencepiece(path)
        except UserError as error:
            assert "not a SentencePiece model" in error.message
        else:  # a message that ends between two fields is one too
            assert replace(part, pieces=()) != model
    where, random = whole.index(model.charsmap), random_generator(0)
    for _ in range(150):  # in the rules, which `tokenizers` follows without looking
        broken = bytearray(whole)
        for place in random.integers(where, where + len(model.charsmap), 30):
            broken[place] = random.integers(256)
        path.write_bytes(broken)
        try:
            spiece_to_tokenizer(path, tmp_path)
        except UserError as error:
            assert "rules of normalisation" in error.message or "decode" in error.message
        else:
            Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("ﬁ ½ é Ⅷ ﷺ")
    path.write_bytes(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f")
    with pytest.raises(UserError, match="field 1 is cut"):
        read_sentencepiece(path)
    with pytest.raises(UserError, match=r"none\.model"):
        read_sentencepiece(tmp_path / "none.model")
