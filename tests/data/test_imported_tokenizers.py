"""Tokenizers from elsewhere: tokenizer.json of both kinds, and sentencepiece models with a dummy prefix."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from slotmamba_data import StreamDecoder, Tokenizer, build_text, open_text
from slotmamba_data.tokenizer_training import import_tokenizer

AWKWARD = "  two, \ttab\r\n\0 <|endoftext|> <s></s> \N{GRINNING FACE} e\N{COMBINING ACUTE ACCENT} ﬁ <0x0A> "


@pytest.fixture(scope="module")
def text() -> list[str]:
    return [text for _, text in zip(range(8), open_text("austen:val"), strict=False)]


@pytest.fixture(scope="module")
def byte_level(text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As GPT-2's: pieces of bytes, one special token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_tokens(["Northanger Abbey"])  # not special: text
    folder = tmp_path_factory.mktemp("byte-level")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def byte_fallback(text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Llama's: a mark for spaces, one before every text, and bytes for what the vocabulary lacks."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    mark = "\N{LOWER ONE EIGHTH BLOCK}"
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(mark), normalizers.Replace(" ", mark)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(text[:3], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # the bytes are ordinary tokens there
    folder = tmp_path_factory.mktemp("byte-fallback")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def dummy_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Mistral's: sentencepiece with a space before every text and without padding."""
    folder = tmp_path_factory.mktemp("dummy-prefix")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for document in open_text("austen:val") for line in document.splitlines()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder


@pytest.mark.parametrize(
    ("kind", "size", "special", "prefix"),
    [
        ("byte_level", 601, (0, 0, -1), ""),
        ("byte_fallback", 700, (1, 2, -1), " "),
        ("dummy_prefix", 600, (1, 2, -1), " "),
    ],
)
def test_they_give_text_back(
    request: pytest.FixtureRequest, text: list[str], kind: str, size: int, special: tuple[int, ...], prefix: str
) -> None:
    tokenizer = Tokenizer(request.getfixturevalue(kind))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == special
    assert (tokenizer.vocab_size, tokenizer.prefix) == (size, prefix)
    for each in (*text, AWKWARD, "Northanger Abbey is a book", ""):
        tokens = tokenizer.encode(each)
        assert tokens.dtype == np.int32 and not np.isin(tokens, [token for token in special if token >= 0]).any()
        if each or prefix:
            decoder = StreamDecoder(tokenizer)
            given = "".join(map(decoder.push, tokens.tolist())) + decoder.flush()
            assert given == tokenizer.decode(tokens) == (prefix + each if len(tokens) else "")
    assert len(tokenizer.encode(text[0])) < len(text[0].encode()) / 1.5


def test_imported_tokenizers_make_shards(byte_level: Path, tmp_path: Path) -> None:
    report = import_tokenizer(byte_level / "tokenizer.json", tmp_path / "tokenizer", validation=["austen:test"])
    assert report.vocab_size == 601 and report.measured.sources[0].not_given_back == 0
    assert set(report.versions) == {"tokenizers"}
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    assert tokenizer.digest == report.model_sha256
    (tmp_path / "a.txt").write_text("Some text.\n")
    manifest = build_text([tmp_path / "a.txt"], tokenizer, tmp_path / "shards")["train"]
    assert manifest.tokenizer == tokenizer.digest and manifest.tokens == 2 + len(tokenizer.encode("Some text.\n"))


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "dummy_prefix"])
def test_worker_processes_get_the_same_tokenizer(text: list[str], kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = Tokenizer(request.getfixturevalue(kind))
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.digest, copy.vocab_size) == (tokenizer.digest, tokenizer.vocab_size)
    for each in text:
        np.testing.assert_array_equal(copy.encode(each), tokenizer.encode(each))


def test_what_cannot_be_used_is_said(byte_level: Path, tmp_path: Path) -> None:
    content = json.loads((byte_level / "tokenizer.json").read_text())

    def refused(message: str, **changes: object) -> None:
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | changes))
        with pytest.raises(ValueError, match=message):
            Tokenizer(tmp_path)

    refused("neither byte-level nor marked", decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
    refused("lacks a token for beginning or end", added_tokens=[])
    refused("does not give every text back", normalizer={"type": "Lowercase"}, pre_tokenizer=None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json that can be read"):
        Tokenizer(tmp_path)
