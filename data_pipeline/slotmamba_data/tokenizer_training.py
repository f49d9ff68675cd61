"""Train a lossless sentencepiece tokenizer, or take one from elsewhere, and write down what it is made of."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import random
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from slotmamba_data.errors import InputError
from slotmamba_data.files import naming, sha256_hex, write_file
from slotmamba_data.text import open_text
from slotmamba_data.tokenizer import Tokenizer
from slotmamba_data.tokenizer_file import JSON_NAME, MODEL_NAME, tokenizer_name
from slotmamba_data.tokenizer_models import SPACE_MARK
from slotmamba_data.tokenizer_report import Measurement, measure

REPORT_NAME = "report.json"
SENTENCE_BYTES = 4096  # the trainer drops longer lines; ours are split before it sees them
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
        measured_on: names of the validation inputs, or of those it was trained on.
        measured: how it does on them.
        bytes_per_token: UTF-8 bytes of text to a token, over all of that.
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
    measured_on: tuple[str, ...]
    measured: Measurement
    bytes_per_token: float


@dataclass
class _Corpus:
    """Reads the inputs and counts what went by."""

    specs: Sequence[str | Path]
    inputs: list[InputReport] = field(default_factory=list)
    lines: int = 0
    split_lines: int = 0
    skipped_lines: int = 0

    def sample(self, size: int, seed: int, weights: Sequence[float] | None) -> list[str]:
        """At most `size` sentences: of all, each as likely as the others, or with `weights` such that the bytes of the
        inputs are in that proportion, as many as that allows.

        Sentencepiece could draw them too, but its draw cannot be seeded.
        """
        generator = random.Random(seed)
        if weights is None:
            return _draw(itertools.chain.from_iterable(map(self._read, self.specs)), size, generator)
        drawn = [_draw(self._read(spec), size, generator) for spec in self.specs]
        for sentences in drawn:
            generator.shuffle(sentences)
        return _in_proportion(drawn, weights, size)

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


def _draw(sentences: Iterable[str], size: int, generator: random.Random) -> list[str]:
    """At most `size` of the sentences, each as likely as the others (Vitter's algorithm R)."""
    sample: list[str] = []
    for number, sentence in enumerate(sentences):
        if number < size:
            sample.append(sentence)
        elif (place := int(generator.random() * (number + 1))) < size:
            sample[place] = sentence
    return sample


def _in_proportion(drawn: Sequence[list[str]], weights: Sequence[float], size: int) -> list[str]:
    """The first sentences of each input, whose bytes are in proportion to the weights, at most `size` in all."""
    ends = [list(itertools.accumulate(len(sentence.encode()) for sentence in sentences)) for sentences in drawn]
    budget = min(own[-1] / weight if own else 0.0 for own, weight in zip(ends, weights, strict=True))
    while True:
        counts = [bisect_right(own, budget * weight) for own, weight in zip(ends, weights, strict=True)]
        if sum(counts) <= size:
            return [sentence for sentences, count in zip(drawn, counts, strict=True) for sentence in sentences[:count]]
        budget *= size / sum(counts)


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
    weights: Sequence[float] | None = None,
    validation: Sequence[str | Path] = (),
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
        weights: of the inputs in a mixture: the bytes that the trainer looks at are in that proportion, as many as the
            scarcest input allows. By default every line of all inputs is as likely as the others.
        validation: inputs to measure it on; by default the beginning of each source that it was trained on.

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
    if weights is not None:
        if len(weights) != len(inputs) or not all(weight > 0 for weight in weights):
            raise InputError(f"weights {list(weights)}: expected one above 0 for each of {len(inputs)} inputs")
        arguments["weights"] = list(weights)
    corpus = _Corpus(inputs)
    sentences = corpus.sample(input_sentence_size, seed, weights)
    if not sentences:
        raise InputError("the inputs hold no line of text to train a tokenizer on")
    model = _train(sentences, vocab_size, model_type)
    with naming(output):
        output.mkdir(parents=True, exist_ok=True)
    write_file(output / MODEL_NAME, model)
    tokenizer = Tokenizer(output / MODEL_NAME)
    measured = measure(tokenizer, validation, limit=None) if validation else measure(tokenizer, inputs)
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
        measured_on=tuple(map(str, validation or inputs)),
        measured=measured,
        bytes_per_token=measured.bytes_per_token,
    )
    _write_report(output, report)
    return report


@dataclass(frozen=True)
class ImportReport:
    """An imported tokenizer, as saved beside it: where it came from, digest of the file, and what was measured."""

    imported_from: str
    model_sha256: str
    vocab_size: int
    versions: dict[str, str]
    measured_on: tuple[str, ...]
    measured: Measurement
    bytes_per_token: float


def import_tokenizer(path: str | Path, output: Path, *, validation: Sequence[str | Path]) -> ImportReport:
    """Copy a sentencepiece model or a Hugging Face `tokenizer.json` into the folder `output`, and measure it.

    Args:
        path: the file, or its folder.
        output: folder, made when missing, for `tokenizer.model` or `tokenizer.json`, and `report.json`.
        validation: inputs to measure it on.

    Raises:
        InputError: it cannot be used (`Tokenizer` says why), or an input cannot be read.
        OSError: the output cannot be written.
    """
    tokenizer = Tokenizer(path)
    measured = measure(tokenizer, validation, limit=None)
    name = tokenizer_name(tokenizer.path)
    package = "tokenizers" if name == JSON_NAME else "sentencepiece"
    report = ImportReport(
        imported_from=str(path),
        model_sha256=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        versions={package: metadata.version(package)},
        measured_on=tuple(map(str, validation)),
        measured=measured,
        bytes_per_token=measured.bytes_per_token,
    )
    with naming(output):
        output.mkdir(parents=True, exist_ok=True)
    write_file(output / name, tokenizer.path.read_bytes())
    _write_report(output, report)
    return report


def _write_report(output: Path, report: TokenizerReport | ImportReport) -> None:
    write_file(output / REPORT_NAME, (json.dumps(dataclasses.asdict(report), indent=1) + "\n").encode())


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
