"""Whether a tokenizer.json is one that the library `tokenizers` can take, which ends the program or fills the memory otherwise."""

import base64
import binascii
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.models.sentencepiece_model import Broken, check_charsmap

MOST_IDS = 2**22  # the library has a place for each id up to the largest; vocabularies have 256,000
AGAIN = "download the model again"


def check_tokenizer(path: Path) -> None:
    """Looks at the ids of tokens and at tables of normalisation; everything else the library refuses by itself.

    Raises:
        UserError: it is not JSON, or one of them makes no sense.
    """
    found = read_json(path)
    model = found.get("model") if isinstance(found, Mapping) else None
    if not isinstance(model, Mapping):
        raise UserError(f"{path}: no model in it", hint=AGAIN)
    vocabulary, added = model.get("vocab"), found.get("added_tokens") or []
    for name, number in _ids(vocabulary, added):
        if type(number) is not int or not 0 <= number < MOST_IDS:
            raise UserError(f"{path}: token {name!r:.60} has the id {number!r:.40}", hint=AGAIN)
    for charsmap in _charsmaps(found.get("normalizer")):
        try:
            check_charsmap(base64.b64decode(charsmap, validate=True))
        except (Broken, TypeError, UnicodeDecodeError, binascii.Error, ValueError) as error:
            raise UserError(f"{path}: precompiled_charsmap: {error}", hint=AGAIN) from error


def _ids(vocabulary: Any, added: Any) -> Iterator[tuple[Any, Any]]:
    yield from vocabulary.items() if isinstance(vocabulary, Mapping) else ()
    for token in added if isinstance(added, list) else ():
        yield (token.get("content"), token.get("id")) if isinstance(token, Mapping) else (token, None)


def _charsmaps(normalizer: Any) -> Iterator[Any]:
    """Of a normalizer and all within it."""
    waiting = [normalizer]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        elif isinstance(one, Mapping):
            waiting += [value for value in one.values() if isinstance(value, list | Mapping)]
            if one.get("type") == "Precompiled":
                yield one.get("precompiled_charsmap")
