"""Small trained tokenizers of the kinds that llama.cpp knows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_models import CHATML, SENTENCES, SPECIAL, VOCABULARY

from mlx_finetune.export.gguf_pieces import BLANK, ESCAPE, ON_SPACES, PREPEND
from mlx_finetune.models.gguf_pre import RULES, pre_tokenizer_steps

INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
BLANKS = {
    "prepended": (PREPEND, None),
    "first": (None, {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": "first", "split": False}),
    "never": (ESCAPE, ON_SPACES),
}


def byte_level(rule: str, adds: Sequence[str] = ()) -> Any:
    """Byte-level BPE that splits by a rule of llama.cpp; `adds`: bos, eos around each text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre_tokenizer_steps(rule)}
    state["model"]["ignore_merges"] = RULES[rule][1]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY + 40,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL],
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*SENTENCES, "It's 12345 333 22, isn't it? We'll see: don't. 你好 你好", "\n\n\n  \n\n    "], trainer
    )
    if adds:
        _surround(tokenizer, adds)
    names = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "unk_token": SPECIAL[0], "pad_token": SPECIAL[0]}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = CHATML
    return fast


def _surround(tokenizer: Any, adds: Sequence[str]) -> None:
    from tokenizers import processors

    around = f"{SPECIAL[1]} $A" + (f" {SPECIAL[2]}" if "eos" in adds else "")
    named = [(token, tokenizer.token_to_id(token)) for token in SPECIAL[1:]]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=named)


def of_pieces(folder: Path, kind: str, whole: Sequence[str] = (), taking: Sequence[str] = ()) -> Any:
    """SentencePiece's BPE, trained by itself, as transformers keeps it.

    kind: "prepended" (Llama 2's tokenizer.json), "first" (what transformers 5 makes of it), "never" (Gemma).
    whole: tokens that are found before a text is merged. taking: those that take the blanks behind them, as Phi-3's.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import generate_merges

    folder.mkdir(exist_ok=True)
    texts = [*SENTENCES, "class Reader:\n    def read(self):\n        return [1, 2]\n", "    \n        \n"] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "pieces"), vocab_size=460, model_type="bpe", byte_fallback=True,
        split_digits=True, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
        minloglevel=2,
    )  # fmt: skip
    trained = sentencepiece.SentencePieceProcessor(model_file=str(folder / "pieces.model"))
    pieces = [(trained.id_to_piece(number), trained.get_score(number)) for number in range(trained.vocab_size())]
    vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
    merges = generate_merges(vocabulary, pieces, skip_tokens=[piece for piece, _ in pieces[:259]])
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    state = json.loads(tokenizer.to_str())
    state["normalizer"], state["pre_tokenizer"] = BLANKS[kind]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = dict.fromkeys(["<unk>", "<s>", "</s>", "<|end|>", "<|endoftext|>", *taking])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, rstrip=token in taking) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in whole])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = INST
    return fast
