"""Tokens and text: a sentencepiece model that gives every text back exactly, whole or token by token."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

from slotmamba_data.errors import InputError
from slotmamba_data.files import naming, sha256_hex
from slotmamba_data.text import is_unicode
from slotmamba_data.tokenizer_file import find_tokenizer

# Sentencepiece writes a space as this character and so would read the character itself back as a space.
SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
_PROBE = " a  b\tc\r\n\0\N{LATIN SMALL LETTER E WITH ACUTE}\N{GRINNING FACE}" + SPACE_MARK


class Tokenizer:
    """A sentencepiece model made by `slotmamba data tokenizer`.

    Attributes:
        path: the model file.
        digest: SHA-256 of the model file, hexadecimal; shards carry it.
        vocab_size: number of tokens.
        pad_id, bos_id, eos_id: padding, beginning and end of a document.

    Raises:
        InputError: no such file, not a sentencepiece model, or one that does not give every text back.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = find_tokenizer(path)
        with naming(self.path):
            model = self.path.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise InputError(f"tokenizer {self.path} is not a sentencepiece model") from error
        self.digest = sha256_hex(model)
        self.vocab_size: int = self._processor.get_piece_size()
        self.pad_id: int = self._processor.pad_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self._bytes = [self._bytes_of(token) for token in range(self.vocab_size)]
        self._space_mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        if min(self.pad_id, self.bos_id, self.eos_id) < 0 or self.decode(self.encode(_PROBE)) != _PROBE:
            raise InputError(
                f"tokenizer {self.path} does not give every text back, or lacks a token for padding, beginning or end: "
                "make one with `slotmamba data tokenizer`"
            )

    def _bytes_of(self, token: int) -> bytes:
        piece = self._processor.id_to_piece(token)
        if self._processor.is_control(token):
            return b""
        if self._processor.is_unknown(token):
            return b"\xef\xbf\xbd"  # U+FFFD; byte fallback never encodes to it, but a model may say it
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE_MARK, " ").encode()

    def encode(self, text: str) -> np.ndarray:
        """The tokens of `text`, without beginning and end: int32 [tokens].

        Raises:
            InputError: the text holds half a surrogate pair.
        """
        if not is_unicode(text):
            raise InputError("the text holds half a surrogate pair, which is no character")
        tokens: list[int] = []
        for number, part in enumerate(text.split(SPACE_MARK)):
            if number:
                tokens += self._space_mark
            tokens += self._processor.encode(part)
        return np.asarray(tokens, dtype=np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; special tokens are nothing, bytes that are not UTF-8 become U+FFFD.

        Raises:
            InputError: a token is outside the vocabulary.
        """
        return b"".join(map(self.token_bytes, tokens)).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that one token stands for; none for special tokens.

        Raises:
            InputError: the token is outside the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise InputError(f"token {token} is outside the {self.vocab_size} of tokenizer {self.path}")
        return self._bytes[token]


class StreamDecoder:
    """Text of tokens that arrive one by one: a character is given out once all of its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes: maybe none, never part of a character."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for bytes that never became a character, else nothing."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
