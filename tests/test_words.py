"""Words that are known again have the very tokens and places that the tokenizer itself finds, or it does the work."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import mlx_finetune
from mlx_finetune.data.words import Words, arrays_of

SAMPLE = Path(mlx_finetune.__file__).parent / "sample"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def behind(*patterns: str) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, BYTES])


# As the tokenizers of these models cut, by their tokenizer.json.
CUTS: dict[str, pre_tokenizers.PreTokenizer] = {
    "gpt2": GPT2,
    "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), GPT2]),
    "llama3": behind(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen3": behind(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "o200k": behind(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "deepseek": behind(
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
NOT_BY_EXPRESSIONS: dict[str, pre_tokenizers.PreTokenizer] = {
    "metaspace": pre_tokenizers.Metaspace(),
    "blank in front": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "a group": behind(r"(\w)+|\W+"),
}


def texts_of_sample() -> list[str]:
    lines = [line for path in sorted(SAMPLE.glob("gptme-logs/*/*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line)["content"] for line in lines]


def tokenizer_of(cut: pre_tokenizers.PreTokenizer, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, special_tokens=["<|im_end|>"], show_progress=False)
    tokenizer.train_from_iterator(texts_of_sample(), trainer)
    tokenizer.add_tokens(["<think>", "</think>", AddedToken("<tool_call>", normalized=True)])
    tokenizer.encode_special_tokens = True
    return tokenizer


def check(words: Words, tokenizer: Tokenizer, texts: list[str]) -> None:
    for text, own, its in zip(texts, words.encode(texts), tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
        assert all(map(np.array_equal, own, arrays_of(its))), text
    assert words.count(texts) == [len(one.ids) for one in tokenizer.encode_batch(texts, add_special_tokens=False)]


def random_texts(seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    parts = "the  file's 0123 9 foo_bar <think> </think>\n <|im_end|> é e\u0301 日本語 한국 🙂 👩\u200d👧 \u00a0".split(" ")
    parts += ["\u2028", "\x1c", "\x85", *"½²Ⅷǅŉßא٣๑ﬁ\u0903\u20dd", "\n\n", " \t", "\n  "]
    parts += [" ", "  ", "\n", "\r\n", "'LL", "'s", "-", "...", "=>", "\x00", "\ufeff", "\u200b", "\U000e0041"]
    return ["".join(random.choice(parts, random.integers(1, 60))) for _ in range(300)]


@pytest.mark.parametrize("name", CUTS)
def test_known_words_have_the_tokens_and_places_of_the_tokenizer(name: str) -> None:
    for normalizer in (None, normalizers.NFC()):
        tokenizer = tokenizer_of(CUTS[name], normalizer)
        words = Words(tokenizer)
        assert words.fast
        assert len(words._cuts.blocks("One.\nTwo  \n\nThree")) == 3
        for texts in (texts_of_sample(), random_texts(1), random_texts(2)):
            check(words, tokenizer, texts)
            check(words, tokenizer, texts)


@pytest.mark.parametrize("name", NOT_BY_EXPRESSIONS)
def test_a_tokenizer_that_cuts_in_another_way_does_the_work_itself(name: str) -> None:
    tokenizer = tokenizer_of(NOT_BY_EXPRESSIONS[name])
    words = Words(tokenizer)
    assert not words.fast
    check(words, tokenizer, [*texts_of_sample(), *random_texts(3)])


def test_what_a_normalizer_changes_is_left_to_the_tokenizer() -> None:
    tokenizer = tokenizer_of(CUTS["qwen3"], normalizers.NFC())
    check(Words(tokenizer), tokenizer, ["e\u0301a", "\u1e9b\u0323", "\u212b", "plain"])
    lower = tokenizer_of(CUTS["qwen3"], normalizers.Lowercase())
    assert not Words(lower).fast


def test_a_token_that_takes_blanks_with_it_is_left_to_the_tokenizer() -> None:
    tokenizer = tokenizer_of(CUTS["gpt2"])
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    words = Words(tokenizer)
    check(words, tokenizer, ["a  <mask> b", "plain"])


def test_words_are_forgotten_before_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_finetune.data.words.MOST_KEPT", 2000)
    tokenizer = tokenizer_of(CUTS["llama3"])
    words = Words(tokenizer)
    for text in texts_of_sample():
        check(words, tokenizer, [text, text[::-1]])
        assert words._words.characters + words._blocks.characters < 2 * 2000 + 6 * len(text)
