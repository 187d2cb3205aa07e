"""Small trained tokenizers of the kinds that llama.cpp knows."""

import json
from collections.abc import Sequence
from typing import Any

from tiny_models import CHATML, SENTENCES, SPECIAL, VOCABULARY

from mlx_finetune.models.gguf_pre import RULES, pre_tokenizer_steps


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
