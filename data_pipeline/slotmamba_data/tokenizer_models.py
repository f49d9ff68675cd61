"""The two kinds of tokenizer files, as what a `Tokenizer` needs of them: pieces of bytes, special tokens, encoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from slotmamba_data.errors import InputError

# Sentencepiece writes a space as this character and so would read the character itself back as a space.
SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
UNKNOWN = b"\xef\xbf\xbd"  # U+FFFD; a model that gives every text back never encodes to it, but may say it

_BEGINNINGS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<|endoftext|>", "[CLS]")
_ENDS = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "[SEP]")
_PADDINGS = ("<pad>", "[PAD]", "<|pad|>")


class TokenizerModel(Protocol):
    """A loaded tokenizer file.

    Attributes:
        pieces: the UTF-8 bytes that each token stands for; none for special tokens.
        pad_id, bos_id, eos_id: -1 where there is none.
    """

    pieces: list[bytes]
    pad_id: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, none of them special."""
        ...


class SentencePieceModel:
    """A sentencepiece model file."""

    def __init__(self, content: bytes, path: Path) -> None:
        """
        Raises:
            InputError: it is none.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise InputError(f"tokenizer {path} is not a sentencepiece model") from error
        self.pad_id: int = self._processor.pad_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.pieces = [self._bytes_of(token) for token in range(self._processor.get_piece_size())]
        # Between parts a model that puts a space before every text would put one, too.
        begins_with_space = any(self.pieces[token][:1] == b" " for token in self._processor.encode("a")[:1])
        space_mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._space_mark = None if begins_with_space or self._processor.unk_id() in space_mark else space_mark

    def _bytes_of(self, token: int) -> bytes:
        piece = self._processor.id_to_piece(token)
        if self._processor.is_control(token):
            return b""
        if self._processor.is_unknown(token):
            return UNKNOWN
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace(SPACE_MARK, " ").encode()

    def encode(self, text: str) -> list[int]:
        if self._space_mark is None:
            return list(self._processor.encode(text))
        tokens: list[int] = []
        for number, part in enumerate(text.split(SPACE_MARK)):
            if number:
                tokens += self._space_mark
            tokens += self._processor.encode(part)
        return tokens


class HuggingFaceModel:
    """A `tokenizer.json`: byte-level (GPT-2 and its heirs), or with a mark for spaces and bytes (Llama and its)."""

    def __init__(self, content: bytes, path: Path) -> None:
        """
        Raises:
            InputError: it is none, or its pieces are of another kind; or the package tokenizers is not installed.
        """
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            raise InputError(f"tokenizer {path} needs the package tokenizers: pip install 'slotmamba[data]'") from error
        try:
            settings = json.loads(content)
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises plain ones
            raise InputError(f"tokenizer {path} is not a tokenizer.json that can be read: {error}") from error
        # What looks like a special token in a text is text.
        self._tokenizer.encode_special_tokens = True
        added = {
            token["id"]: b"" if token["special"] else token["content"].encode() for token in settings["added_tokens"]
        }
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.pieces = [UNKNOWN] * (max(vocabulary.values()) + 1)
        byte_level = _is_byte_level(settings, path)
        for piece, token in vocabulary.items():
            self.pieces[token] = added[token] if token in added else _bytes_of(piece, byte_level)
        special = {token["content"]: token["id"] for token in settings["added_tokens"] if token["special"]}
        self.bos_id, self.eos_id, self.pad_id = (
            next((special[name] for name in names if name in special), -1) for names in (_BEGINNINGS, _ENDS, _PADDINGS)
        )

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _is_byte_level(settings: dict[str, Any], path: Path) -> bool:
    decoder = settings.get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        return True
    marks = any(part.get("type") == "Replace" and part.get("pattern") == {"String": SPACE_MARK} for part in parts)
    if "Metaspace" in kinds or marks:
        return False
    raise InputError(
        f"tokenizer {path} has pieces that are neither byte-level nor marked with {SPACE_MARK} for a space "
        f"(decoder {', '.join(map(str, kinds))}): they do not say which bytes they stand for"
    )


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in a byte-level vocabulary: themselves where they can be printed."""
    printed = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printed)
    return {chr(byte): byte for byte in printed} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _bytes_of(piece: str, byte_level: bool) -> bytes:
    if byte_level:
        return bytes(_BYTE_OF[character] for character in piece) if all(c in _BYTE_OF for c in piece) else UNKNOWN
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE_MARK, " ").encode()
