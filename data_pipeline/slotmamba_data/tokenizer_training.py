"""Train a lossless sentencepiece tokenizer and write down what it was made of."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from slotmamba_data.errors import InputError
from slotmamba_data.files import naming, sha256_hex, write_file
from slotmamba_data.text import open_text
from slotmamba_data.tokenizer import SPACE_MARK, Tokenizer
from slotmamba_data.tokenizer_file import MODEL_NAME

REPORT_NAME = "report.json"
SENTENCE_BYTES = 4096  # the trainer drops longer lines; ours are split before it sees them
MEASURED_BYTES = 4 * 1024 * 1024  # text on which bytes per token is measured: the beginning of the corpus
# Sentencepiece keeps this character for itself and skips every line that holds it.
_RESERVED = "\N{LOWER FIVE EIGHTHS BLOCK}"
# The model file records the number of threads and unigram's sums depend on it: one number for every machine.
_THREADS = 4


@dataclass(frozen=True)
class InputReport:
    """One input of the corpus: its name as given, and its text."""

    name: str
    documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TokenizerReport:
    """What a tokenizer was made of, as saved beside it.

    Attributes:
        model_sha256: digest of the model file, which shards carry.
        corpus_sha256: digest of the digests of all inputs, in order.
        inputs: the inputs.
        arguments: how the trainer was called.
        versions: of the packages that decide the result.
        lines: lines of text, empty ones not counted.
        split_lines: lines longer than `SENTENCE_BYTES`, which were split.
        skipped_lines: lines that the trainer cannot take, because they hold its reserved character U+2585.
        sampled_sentences: how many (split) lines the trainer looked at, at most `input_sentence_size`.
        bytes_per_token: UTF-8 bytes of text to a token, over `measured_bytes` at the beginning of the corpus.
    """

    model_sha256: str
    corpus_sha256: str
    inputs: tuple[InputReport, ...]
    arguments: dict[str, Any]
    versions: dict[str, str]
    lines: int
    split_lines: int
    skipped_lines: int
    sampled_sentences: int
    bytes_per_token: float
    measured_bytes: int


@dataclass
class _Corpus:
    """Reads the inputs and counts what went by."""

    specs: Sequence[str | Path]
    inputs: list[InputReport] = field(default_factory=list)
    lines: int = 0
    split_lines: int = 0
    skipped_lines: int = 0

    def sample(self, size: int, seed: int) -> list[str]:
        """At most `size` sentences of all, each as likely as the others (Vitter's algorithm R).

        Sentencepiece could draw them too, but its draw cannot be seeded.
        """
        generator = random.Random(seed)
        sample: list[str] = []
        for number, sentence in enumerate(itertools.chain.from_iterable(map(self._read, self.specs))):
            if number < size:
                sample.append(sentence)
            elif (place := int(generator.random() * (number + 1))) < size:
                sample[place] = sentence
        return sample

    def _read(self, spec: str | Path) -> Iterator[str]:
        digest = hashlib.sha256()
        documents = size = 0
        for document in open_text(spec):
            content = document.encode()
            digest.update(content)
            documents += 1
            size += len(content)
            for line in document.split("\n"):
                yield from self._sentences(line.rstrip("\r"))
        self.inputs.append(InputReport(str(spec), documents, size, digest.hexdigest()))

    def _sentences(self, line: str) -> Iterator[str]:
        if not line:
            return
        self.lines += 1
        if _RESERVED in line:
            self.skipped_lines += 1
            return
        self.split_lines += len(line.encode()) > SENTENCE_BYTES
        for part in line.split(SPACE_MARK):  # encoding cuts there too
            yield from split_line(part, SENTENCE_BYTES)


def split_line(line: str, limit: int) -> Iterator[str]:
    """Cut a line into parts of at most `limit` UTF-8 bytes, before a space where there is one, never in a character."""
    content = line.encode()
    start = 0
    while len(content) - start > limit:
        stop = content.rfind(b" ", start + 1, start + limit + 1)
        if stop < 0:
            stop = start + limit
            while content[stop] & 0xC0 == 0x80:  # a continuation byte
                stop -= 1
        yield content[start:stop].decode()
        start = stop
    if start < len(content):
        yield content[start:].decode()


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: Path,
    *,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    input_sentence_size: int = 1_000_000,
    seed: int = 0,
) -> TokenizerReport:
    """Train a tokenizer on `inputs` and write `tokenizer.model` and `report.json` into the folder `output`.

    Any text survives encoding and decoding: no normalisation, every space kept, bytes for what the vocabulary lacks.
    Token 0 is padding, 1 the beginning and 2 the end of a document, 3 is never made. The same inputs and arguments give
    the same model file.

    Args:
        inputs: what `text.open_text` takes.
        output: folder, made when missing; the model is replaced as a whole.
        vocab_size: number of tokens, the 4 special ones and 256 bytes included.
        model_type: byte-pair merges or a unigram language model (slower).
        input_sentence_size: lines to look at, drawn from all lines when there are more: bounds time and memory.
        seed: of that draw.

    Raises:
        InputError: an input cannot be read, or the vocabulary does not suit the corpus (too large, too small).
        OSError: the output cannot be written.
    """
    arguments: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "input_sentence_size": input_sentence_size,
        "seed": seed,
    }
    for name in ("vocab_size", "input_sentence_size"):
        if arguments[name] < 1:
            raise InputError(f"{name}={arguments[name]}: expected at least 1")
    corpus = _Corpus(inputs)
    sentences = corpus.sample(input_sentence_size, seed)
    if not sentences:
        raise InputError("the inputs hold no line of text to train a tokenizer on")
    model = _train(sentences, vocab_size, model_type)
    with naming(output):
        output.mkdir(parents=True, exist_ok=True)
    write_file(output / MODEL_NAME, model)
    bytes_per_token, measured = _measure(Tokenizer(output / MODEL_NAME), inputs)
    report = TokenizerReport(
        model_sha256=sha256_hex(model),
        corpus_sha256=sha256_hex("".join(entry.sha256 for entry in corpus.inputs).encode()),
        inputs=tuple(corpus.inputs),
        arguments=arguments,
        versions={"sentencepiece": sentencepiece.__version__},
        lines=corpus.lines,
        split_lines=corpus.split_lines,
        skipped_lines=corpus.skipped_lines,
        sampled_sentences=len(sentences),
        bytes_per_token=bytes_per_token,
        measured_bytes=measured,
    )
    write_file(output / REPORT_NAME, (json.dumps(dataclasses.asdict(report), indent=1) + "\n").encode())
    return report


def _train(sentences: list[str], vocab_size: int, model_type: str) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            max_sentence_length=SENTENCE_BYTES,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # one token for a run of spaces, as in indented code
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        # "INTERNAL: src/file.cc(744) [condition] What is wrong." in sentencepiece's words.
        reason = re.sub(r"^\w+: \S+\(\d+\) \[.*?\] (?=\S)", "", str(error))
        reason = reason.removesuffix(" or decrease character_coverage with --character_coverage option.")
        raise InputError(f"sentencepiece cannot train {vocab_size} tokens: {reason}") from error
    return model.getvalue()


def _measure(tokenizer: Tokenizer, inputs: Sequence[str | Path]) -> tuple[float, int]:
    """Bytes per token over the first `MEASURED_BYTES` of the inputs or a little more, and how many bytes those are."""
    size = tokens = 0
    for spec in inputs:
        for document in open_text(spec):
            size += len(document.encode())
            tokens += len(tokenizer.encode(document))
            if size >= MEASURED_BYTES:
                return size / tokens, size
    return size / tokens, size
