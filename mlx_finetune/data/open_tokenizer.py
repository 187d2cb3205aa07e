"""The tokenizer of a model folder as transformers opens it; no code from the folder is run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_finetune.errors import REFUSALS, UserError
from mlx_finetune.files import read_json
from mlx_finetune.own_code import refuse_own_code

HINT = "use a model with a tokenizer.json"


def open_tokenizer(folder: Path) -> Any:
    """A fast tokenizer with a chat template; raises UserError where there is none."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    try:
        with of_tokenizers(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ImportError, StrictDataclassError, RecursionError, *REFUSALS) as error:  # it reads config.json too
        refuse_own_code(folder, "tokenizer", error)
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{folder}: tokenizer cannot be read: {reason}", hint=HINT) from error
    if not tokenizer.chat_template:
        raise UserError(f"{folder}: no chat template", hint="use the instruct or chat version of this model")
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: only a slow tokenizer", hint=HINT)
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        reason = "multiple chat templates and none that is the default"
        raise UserError(f"{folder}: {reason}", hint="keep the one for chats as chat_template.jinja") from error
    return tokenizer


@contextmanager
def of_tokenizers(folder: Path) -> Iterator[None]:
    """What the library `tokenizers` raises is Exception itself and, where its code panics, not even that: said as UserError."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{folder}: tokenizer.json is not what the library tokenizers reads: {reason}", hint=HINT) from error


def stop_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """Tokens at which a server stops."""
    stops = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    path = folder / "generation_config.json"
    settings = read_json(path) if path.exists() else {}
    eos = settings.get("eos_token_id") if isinstance(settings, dict) else None
    return frozenset(stops | {i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int)})
