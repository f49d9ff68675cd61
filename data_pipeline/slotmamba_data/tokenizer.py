"""Tokens and text: a tokenizer that gives every text back exactly, whole or token by token."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from slotmamba_data.errors import InputError
from slotmamba_data.files import naming, sha256_hex
from slotmamba_data.text import is_unicode
from slotmamba_data.tokenizer_file import JSON_NAME, find_tokenizer, tokenizer_name
from slotmamba_data.tokenizer_models import SPACE_MARK, HuggingFaceModel, SentencePieceModel, TokenizerModel

_PROBE = " a  b\tc\r\n\0\N{LATIN SMALL LETTER E WITH ACUTE}\N{GRINNING FACE}"


class Tokenizer:
    """A sentencepiece model, made by `slotmamba data tokenizer` or elsewhere, or a Hugging Face `tokenizer.json`.

    Attributes:
        path: its file.
        digest: SHA-256 of the file, hexadecimal; shards carry it.
        vocab_size: number of tokens.
        pad_id, bos_id, eos_id: padding (-1 where there is none), beginning and end of a document.
        prefix: what it puts before every text: nothing, or a space (many sentencepiece models).

    Raises:
        InputError: no such file, not a tokenizer, one that does not give every text back, or one without tokens for
            the beginning and the end of a document.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = find_tokenizer(path)
        with naming(self.path):
            content = self.path.read_bytes()
        json = tokenizer_name(self.path) == JSON_NAME
        self._model: TokenizerModel = (HuggingFaceModel if json else SentencePieceModel)(content, self.path)
        self.digest = sha256_hex(content)
        self.vocab_size = len(self._model.pieces)
        self.pad_id, self.bos_id, self.eos_id = self._model.pad_id, self._model.bos_id, self._model.eos_id
        self.prefix = self.decode(self.encode("a")).removesuffix("a")
        # A model that puts a space before every text has none for the mark of a space.
        probe = _PROBE if self.prefix else _PROBE + SPACE_MARK
        if min(self.bos_id, self.eos_id) < 0 or not self.gives_back(probe):
            raise InputError(
                f"tokenizer {self.path} does not give every text back, or lacks a token for beginning or end: "
                "make one with `slotmamba data tokenizer`"
            )

    def gives_back(self, text: str) -> bool:
        """Whether decoding gives what was encoded."""
        return self.decode(self.encode(text)) == self.prefix + text

    def encode(self, text: str) -> np.ndarray:
        """The tokens of `text`, without beginning and end: int32 [tokens].

        Raises:
            InputError: the text holds half a surrogate pair.
        """
        if not is_unicode(text):
            raise InputError("the text holds half a surrogate pair, which is no character")
        return np.asarray(self._model.encode(text), dtype=np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens` after the `prefix`; special tokens are nothing, bytes that are not UTF-8 become U+FFFD.

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
        return self._model.pieces[token]


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
