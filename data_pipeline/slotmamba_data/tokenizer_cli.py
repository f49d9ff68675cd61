"""`slotmamba data tokenizer`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slotmamba_data.build_cli import INPUT_HELP
from slotmamba_data.errors import InputError

if TYPE_CHECKING:
    from slotmamba_data.tokenizer_report import Measurement

_SENTENCES = 1_000_000


def add_tokenizer_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `tokenizer`, whose handler raises InputError for what the user can correct."""
    parser = commands.add_parser(
        "tokenizer",
        help="train or import a tokenizer",
        description="Train a lossless sentencepiece tokenizer, or import a sentencepiece model or a Hugging Face "
        "tokenizer.json (--import), and measure it.",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the tokenizer and report.json"
    )
    parser.add_argument(
        "--validation",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="text to measure it on, source by source (default: the beginning of each source it is trained on)",
    )
    parser.add_argument(
        "--import", dest="imported", type=Path, metavar="FILE", help="take this one instead of training"
    )
    training = parser.add_argument_group("training")
    training.add_argument("--input", nargs="+", action="extend", metavar="FILE", help=INPUT_HELP)
    training.add_argument(
        "--weights",
        nargs="+",
        type=float,
        action="extend",
        metavar="W",
        help="one for each input: look at bytes of them in this proportion (default: every line is as likely)",
    )
    training.add_argument("--vocab-size", type=int, metavar="N", help="number of tokens")
    training.add_argument("--type", choices=("bpe", "unigram"), help="kind of model (default: bpe)")
    training.add_argument(
        "--sentences", type=int, metavar="N", help=f"lines to look at, drawn at random (default: {_SENTENCES})"
    )
    training.add_argument("--seed", type=int, help="of that draw (default: 0)")
    parser.set_defaults(handler=_tokenizer)


def _tokenizer(args: argparse.Namespace) -> int:
    if args.imported is not None:
        return _import(args)
    from slotmamba_data.tokenizer_training import train_tokenizer

    if not args.input or args.vocab_size is None:
        raise InputError("training a tokenizer needs --input and --vocab-size (or give --import to take another one)")
    report = train_tokenizer(
        args.input,
        args.output,
        vocab_size=args.vocab_size,
        model_type=args.type or "bpe",
        input_sentence_size=_SENTENCES if args.sentences is None else args.sentences,
        seed=args.seed or 0,
        weights=args.weights,
        validation=args.validation or (),
    )
    size = sum(entry.bytes for entry in report.inputs)
    print(f"corpus      {size:,} bytes, {report.lines:,} lines, sha256 {report.corpus_sha256[:16]}")
    print(f"split       {report.split_lines:,} long lines; {report.skipped_lines:,} lines skipped")
    print(f"looked at   {report.sampled_sentences:,} lines")
    print(f"tokenizer   {args.vocab_size:,} {args.type or 'bpe'} tokens")
    _print_measurement(report.measured)
    print(f"written to  {args.output}")
    return 0


def _import(args: argparse.Namespace) -> int:
    from slotmamba_data.tokenizer_training import import_tokenizer

    for name in ("input", "weights", "vocab_size", "type", "sentences", "seed"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} has no meaning with --import")
    if not args.validation:
        raise InputError("--import needs --validation, text to measure the tokenizer on, e.g. austen:val")
    report = import_tokenizer(args.imported, args.output, validation=args.validation)
    print(f"tokenizer   {report.vocab_size:,} tokens, sha256 {report.model_sha256[:16]}")
    _print_measurement(report.measured)
    print(f"written to  {args.output}")
    return 0


def _print_measurement(measured: Measurement) -> None:
    print(f"measured    {measured.bytes:,} bytes, {measured.bytes_per_token:.3f} bytes per token")
    print(f"speed       {measured.bytes_per_second / 1e6:,.1f} MB of text a second, encoded on one core")
    width = max(len(each.source) for each in measured.sources)
    print(f"  {'source':<{width}}  {'documents':>9}  {'bytes':>12}  {'bytes/token':>11}  {'tokens/word':>11}")
    for each in measured.sources:
        ratios = f"{each.bytes_per_token:>11.3f}  {each.tokens_per_word:>11.3f}"
        print(f"  {each.source:<{width}}  {each.documents:>9,}  {each.bytes:>12,}  {ratios}")
    lossy = sum(each.not_given_back for each in measured.sources)
    if lossy:
        total = sum(each.documents for each in measured.sources)
        print(f"            {lossy:,} of {total:,} documents are not given back as they were")
