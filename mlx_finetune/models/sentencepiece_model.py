"""A SentencePiece `.model` file, read without the sentencepiece package.

It is one message of protocol buffers (https://protobuf.dev/programming-guides/encoding/), whose fields are those of
sentencepiece_model.proto (https://github.com/google/sentencepiece).
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.reading import read_whole

LONGEST = 64 * 2**20  # bytes of a file: those of the largest vocabularies have 5 MB
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece.Type
MODELS = {1: "Unigram", 2: "BPE", 3: "word", 4: "character"}  # TrainerSpec.ModelType
VARINT, EIGHT_BYTES, COUNTED, FOUR_BYTES = 0, 1, 2, 5  # how a field is written
DAMAGED = "the file is broken or was cut while copying: download it again"
Field = tuple[int, int, Any]  # number, how it is written, value


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its place is its id."""

    text: str
    score: float  # log probability
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What encoding and decoding take of the file."""

    pieces: tuple[Piece, ...]
    algorithm: str
    byte_fallback: bool
    whitespace_as_suffix: bool
    charsmap: bytes  # compiled rules of normalisation; empty: none
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    denormalises: bool  # by rules of its own when it decodes
    roles: Mapping[str, str]  # the pieces that stand for what is unknown, the end, and padding, where there are such

    def ids(self, *kinds: int) -> list[int]:
        """Those of some kinds of pieces."""
        return [number for number, piece in enumerate(self.pieces) if piece.kind in kinds]


class Broken(Exception):
    """What is wrong with the file."""


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """The model that stands in the file.

    Raises:
        UserError: no such file; one that is broken, cut, or no SentencePiece model.
    """
    data = read_whole(path, "a SentencePiece model is needed, such as spiece.model", LONGEST)
    try:
        return _model(data)
    except (Broken, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a SentencePiece model: {' '.join(str(error).split())[:100]}", hint=DAMAGED) from error


def _model(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    denormalizer: dict[int, Any] = {}
    for number, how, value in _fields(data):
        if number in (1, 2, 3, 5) and how != COUNTED:
            raise Broken(f"field {number} is no message")
        if number == 1:
            pieces.append(_piece(value))
        elif number in (2, 3, 5):
            {2: trainer, 3: normalizer, 5: denormalizer}[number].update({n: v for n, _, v in _fields(value)})
    algorithm, charsmap = trainer.get(3, 1), normalizer.get(2, b"")
    if not pieces or algorithm not in MODELS or not isinstance(charsmap, bytes):
        raise Broken("it has no vocabulary, or one of an unknown kind")
    if charsmap:
        check_charsmap(charsmap)
    return SentencePieceModel(
        pieces=tuple(pieces),
        algorithm=MODELS[algorithm],
        byte_fallback=bool(trainer.get(35, False)),
        whitespace_as_suffix=bool(trainer.get(24, False)),
        charsmap=charsmap,
        add_dummy_prefix=bool(normalizer.get(3, True)),
        remove_extra_whitespaces=bool(normalizer.get(4, True)),
        escape_whitespaces=bool(normalizer.get(5, True)),
        denormalises=bool(denormalizer.get(2, b"")),
        roles=_roles(pieces, trainer),
    )


def _roles(pieces: Sequence[Piece], trainer: Mapping[int, Any]) -> dict[str, str]:
    """By the ids of TrainerSpec; one that is negative, of 64 bits, is behind the last piece too."""
    ids = {"unk_token": trainer.get(40, 0), "eos_token": trainer.get(42, 2), "pad_token": trainer.get(43, len(pieces))}
    there = {role: pieces[number] for role, number in ids.items() if isinstance(number, int) and number < len(pieces)}
    return {role: piece.text for role, piece in there.items() if piece.kind in (UNKNOWN, CONTROL)}


def check_charsmap(charsmap: bytes) -> None:
    """A double-array trie (https://github.com/s-yata/darts-clone) in front of texts that end with 0, into which its leaves point.

    Where an entry leads elsewhere, `tokenizers` would end the program.
    """
    size, texts = int.from_bytes(charsmap[:4], "little"), charsmap[4:]
    if size % 1024 or not 0 < size < len(texts) or texts[-1]:
        raise Broken("the rules of normalisation are cut")
    units = np.frombuffer(texts[:size], "<u4").astype(np.int64)
    texts = texts[size:]
    texts.decode()
    inner = np.flatnonzero(units >> 31 == 0)
    children = inner ^ ((units[inner] >> 10) << ((units[inner] & 512) >> 6))
    if ((children | 255) >= len(units)).any():
        raise Broken("the rules of normalisation lead outside of themselves")
    values = units[children[(units[inner] >> 8) & 1 == 1]] & (2**31 - 1)
    if (values >= len(texts)).any() or (np.frombuffer(texts, np.uint8)[values] >> 6 == 0b10).any():
        raise Broken("the rules of normalisation lead into no text")


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, how, value in _fields(data):
        if (number, how) == (1, COUNTED):
            text = value.decode()
        elif (number, how) == (2, FOUR_BYTES):
            (score,) = struct.unpack("<f", value)
        elif (number, how) == (3, VARINT):
            kind = value
    if not text or not NORMAL <= kind <= BYTE or score != score or abs(score) == float("inf"):
        raise Broken(f"a piece {text!r} of kind {kind} with score {score}")
    return Piece(text, score, kind)


def _fields(data: bytes) -> Iterator[Field]:
    """The fields of a message, in the order in which they stand."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, how = tag >> 3, tag & 7
        if how == VARINT:
            value, place = _varint(data, place)
            yield number, how, value
            continue
        if how == COUNTED:
            length, place = _varint(data, place)
        elif how in (EIGHT_BYTES, FOUR_BYTES):
            length = 8 if how == EIGHT_BYTES else 4
        else:
            raise Broken(f"byte {place} begins no field")
        if length > len(data) - place:
            raise Broken(f"field {number} is cut")
        yield number, how, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number in groups of 7 bits, the lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise Broken("it is cut within a number")
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise Broken(f"a number at byte {place} has no end")
