from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from slotmamba_data import StreamDecoder, Tokenizer, open_text, train_tokenizer
from slotmamba_data.tokenizer_training import split_line

AWKWARD = [
    "",
    " ",
    "  two leading, two trailing  ",
    "tab\tand\x0bvertical\x0c",
    "line\nline\r\nline\r\n\n\n",
    "NUL \0 and \x01 and \x7f",
    "\N{LOWER ONE EIGHTH BLOCK}",
    "a\N{LOWER ONE EIGHTH BLOCK} \N{LOWER ONE EIGHTH BLOCK}\N{LOWER ONE EIGHTH BLOCK}b \N{LOWER FIVE EIGHTHS BLOCK}",
    "<s></s><pad><unk><0x0A>",
    "\N{GRINNING FACE}\N{ZERO WIDTH JOINER}e\N{COMBINING ACUTE ACCENT}\N{BYTE ORDER MARK}\N{REPLACEMENT CHARACTER}",
    "\N{DOUBLE QUESTION MARK}",
    "ﬁ ① Å",  # normalisation would change these
]


@pytest.mark.parametrize("text", AWKWARD)
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32
    assert not np.isin(tokens, (0, 1, 2, 3)).any()
    assert tokenizer.decode(tokens) == text
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, tokens.tolist())) + decoder.flush() == text


def test_every_character_survives(tokenizer: Tokenizer) -> None:
    characters = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    random.Random(0).shuffle(characters)
    text = "".join(characters)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_book_survives_in_fewer_tokens_than_bytes(tokenizer: Tokenizer) -> None:
    text = "".join(open_text("austen:val"))
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert 2 * len(tokens) < len(text.encode())


def test_stream_holds_back_unfinished_characters(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("\N{GRINNING FACE}!").tolist()
    assert len(tokens) == 5
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(token) for token in tokens] == ["", "", "", "\N{GRINNING FACE}", "!"]
    assert decoder.flush() == ""
    assert [decoder.push(token) for token in tokens[:2]] == ["", ""]
    assert decoder.flush() == "\N{REPLACEMENT CHARACTER}"
    assert decoder.push(tokens[4]) == "!"  # the cut-off character is gone
    assert decoder.push(tokenizer.eos_id) == ""


def test_special_tokens_and_digest(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 2, 700)
    assert tokenizer.digest == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
    assert tokenizer.decode([1, *tokenizer.encode("text").tolist(), 2, 0]) == "text"
    for token in (-1, 700):
        with pytest.raises(ValueError, match=f"token {token} is outside the 700"):
            tokenizer.decode([token])
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("\ud83d")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_reproducible_and_reported(tmp_path: Path, model_type: str) -> None:
    lines = ["the quick brown fox", "x" * 10_000, "", "\N{LOWER FIVE EIGHTHS BLOCK} skipped", "jumps over the lazy dog"]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(lines * 20))
    reports = [train_tokenizer([corpus], tmp_path / name, vocab_size=284, model_type=model_type) for name in ("a", "b")]
    assert reports[0] == reports[1]
    assert (tmp_path / "a/tokenizer.model").read_bytes() == (tmp_path / "b/tokenizer.model").read_bytes()
    assert (reports[0].lines, reports[0].split_lines, reports[0].skipped_lines) == (80, 20, 20)
    assert reports[0].sampled_sentences == 40 + 20 * 3
    tokenizer = Tokenizer(tmp_path / "a")
    saved = json.loads((tmp_path / "a/report.json").read_text())
    assert saved["model_sha256"] == tokenizer.digest
    assert saved["arguments"]["model_type"] == model_type
    assert saved["versions"]["sentencepiece"] == sentencepiece.__version__
    assert saved["inputs"][0]["sha256"] == hashlib.sha256(corpus.read_bytes()).hexdigest()
    [measured] = saved["measured"]["sources"]
    assert saved["measured_on"] == [measured["source"]] == [str(corpus)]
    assert measured["bytes"] == len(corpus.read_bytes())
    assert (measured["documents"], measured["not_given_back"]) == (len(list(open_text(corpus))), 0)
    count = sum(len(tokenizer.encode(document)) for document in open_text(corpus))
    assert saved["bytes_per_token"] == pytest.approx(measured["bytes"] / count)
    assert measured["tokens_per_word"] == pytest.approx(count / len(corpus.read_text().split()))
    assert saved["measured"]["bytes_per_second"] > 0


def test_seed_decides_which_lines_are_looked_at(tmp_path: Path) -> None:
    reports = [
        train_tokenizer(["austen:val"], tmp_path / str(n), vocab_size=400, input_sentence_size=500, seed=seed)
        for n, seed in enumerate((0, 0, 1))
    ]
    assert reports[0].sampled_sentences == 500 < reports[0].lines
    assert reports[0] == reports[1]
    assert reports[0].model_sha256 != reports[2].model_sha256


def test_weights_decide_how_much_of_each_input_is_looked_at(tmp_path: Path) -> None:
    rng = random.Random(0)
    for name, letters in (("a", "abcdef"), ("b", "uvwxyz")):
        words = ["".join(rng.choices(letters, k=5)) for _ in range(20_000)]
        (tmp_path / f"{name}.txt").write_text("\n".join(" ".join(words[i : i + 10]) for i in range(0, 20_000, 10)))
    inputs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    looked: dict[tuple[float, float], list[int]] = {}
    for weights in ((1.0, 1.0), (3.0, 1.0), (1.0, 9.0)):
        report = train_tokenizer(inputs, tmp_path / "out", vocab_size=300, weights=weights, validation=inputs[:1])
        assert report.measured_on == (str(inputs[0]),) and report.lines == 4000
        looked[weights] = [report.sampled_sentences]
    # all of the scarcer input and as much of the other as the proportion allows
    assert looked == {(1.0, 1.0): [4000], (3.0, 1.0): [2666], (1.0, 9.0): [2222]}
    few = train_tokenizer(inputs, tmp_path / "out", vocab_size=280, weights=(3.0, 1.0), input_sentence_size=100)
    assert 90 <= few.sampled_sentences <= 100
    for wrong in ((1.0,), (1.0, 0.0)):
        with pytest.raises(ValueError, match="expected one above 0 for each of 2 inputs"):
            train_tokenizer(inputs, tmp_path / "out", vocab_size=280, weights=wrong)


def test_long_lines_are_split_between_words_and_characters() -> None:
    for line in ("word " * 50, "\N{GRINNING FACE}" * 50, "a" * 100, " " * 100, "", "é" + "ab " * 7 + "ü" * 60):
        parts = list(split_line(line, 16))
        assert "".join(parts) == line
        assert all(0 < len(part.encode()) <= 16 for part in parts)
    assert list(split_line("one two three four", 9)) == ["one two", " three", " four"]


@pytest.mark.parametrize(
    ("text", "vocab_size", "message"),
    [
        ("some words", 100_000, r"cannot train 100000 tokens: Vocabulary size too high.*<= \d+"),
        ("some words", 0, "vocab_size=0: expected at least 1"),
        ("some words", 100, "cannot train 100 tokens: Vocabulary size is smaller than required_chars"),
        ("\n\n", 300, "no line of text"),
    ],
)
def test_unsuited_vocabulary_is_explained(tmp_path: Path, text: str, vocab_size: int, message: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        train_tokenizer([tmp_path / "a.txt"], tmp_path / "out", vocab_size=vocab_size)
    assert not (tmp_path / "out").exists()


def test_error_in_an_input_is_not_hidden_by_sentencepiece(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"text\n\xff")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        train_tokenizer([tmp_path / "a.txt"], tmp_path / "out", vocab_size=300)


def test_training_prints_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from slotmamba_data import train_tokenizer\n"
        "train_tokenizer(['austen:val'], Path(sys.argv[1]), vocab_size=400)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_unusable_model_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no tokenizer .*none\.model"):
        Tokenizer(tmp_path / "none.model")
    with pytest.raises(ValueError, match=r"there is no tokenizer .*tokenizer\.model"):
        Tokenizer(tmp_path)
    other = tmp_path / "other.model"
    other.write_bytes(b"This is not a model")
    with pytest.raises(ValueError, match=r"other\.model is not a sentencepiece model"):
        Tokenizer(other)
    with open(other, "wb") as file:  # sentencepiece's own defaults lose spaces and have no byte fallback
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words of text"] * 9), model_writer=file, vocab_size=15, minloglevel=2
        )
    with pytest.raises(ValueError, match=r"other\.model does not give every text back"):
        Tokenizer(other)
