"""`slotmamba data tokenizer | build | inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slotmamba_data.errors import InputError
from slotmamba_data.tokenizer_cli import add_tokenizer_command

if TYPE_CHECKING:
    from slotmamba_data.mqar_spec import MQARSetting

_INPUT_HELP = "UTF-8 text or .jsonl file (plain, .xz or .gz), or austen:train, austen:val, austen:test; repeatable"


def add_data_commands(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add `data` and its three commands; each leaf sets `handler`, a function from the namespace to an exit code.

    The handlers raise InputError for what the user can correct and OSError for what the system refused.
    """
    data = subparsers.add_parser("data", help="tokenizers and shards", description="Make and check training data.")
    commands = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    add_tokenizer_command(commands, _INPUT_HELP)
    _add_build(commands)
    _add_inspect(commands)


def _add_build(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "build",
        help="write shards",
        description="Write shards of tokenised text, or of associative recall samples (--mqar).",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the shards")
    parser.add_argument("--shard-mib", type=int, default=256, metavar="MIB", help="size of a shard (default: 256)")
    parser.add_argument("--overwrite", action="store_true", help="replace a complete folder")
    text = parser.add_argument_group("text")
    text.add_argument("--input", nargs="+", action="extend", metavar="FILE", help=_INPUT_HELP)
    text.add_argument("--tokenizer", type=Path, metavar="MODEL", help="tokenizer.model, or its folder")
    text.add_argument(
        "--validation",
        type=float,
        metavar="SHARE",
        help="share of the documents for DIR/val; the rest goes to DIR/train (default: all to DIR)",
    )
    text.add_argument(
        "--document-kib",
        type=int,
        metavar="KIB",
        help="cut text files into documents of about this size (default: 16); 0 does not",
    )
    recall = parser.add_argument_group("recall")
    recall.add_argument("--mqar", action="store_true", help="write multi-query associative recall instead of text")
    recall.add_argument(
        "--setting",
        nargs="+",
        action="extend",
        metavar="LENGTH:PAIRS:COUNT",
        help="samples to write, e.g. 64:4:1000; repeatable",
    )
    recall.add_argument("--vocab-size", type=int, metavar="N", help="tokens (default: 8192)")
    recall.add_argument(
        "--form", choices=("decoder", "seq2seq"), help="one sequence, or encoder and decoder (default: decoder)"
    )
    recall.add_argument(
        "--fillers", choices=("outside", "any"), help="outside of keys and values, or any token (default: outside)"
    )
    recall.add_argument("--power", type=float, help="exponent of the query gaps (default: 0.01)")
    recall.add_argument("--seed", type=int, help="of the samples (default: 0)")
    parser.set_defaults(handler=_build)


def _add_inspect(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "inspect", help="check shards", description="Check every byte of a folder of shards and describe it."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of shards, or its manifest.json")
    parser.add_argument("--tokenizer", type=Path, metavar="MODEL", help="print the beginning of a document as text")
    parser.add_argument("--document", type=int, default=0, metavar="N", help="which document to print (default: 0)")
    parser.set_defaults(handler=_inspect)


def _build(args: argparse.Namespace) -> int:
    text_only = ("input", "tokenizer", "validation", "document_kib")
    recall_only = ("setting", "vocab_size", "form", "fillers", "power", "seed")
    wrong = [name for name in (text_only if args.mqar else recall_only) if getattr(args, name) is not None]
    if wrong:
        what = "recall samples (--mqar)" if args.mqar else "text (without --mqar)"
        raise InputError(f"--{wrong[0].replace('_', '-')} has no meaning for {what}")
    if args.shard_mib < 1:
        raise InputError(f"--shard-mib {args.shard_mib}: expected at least 1")
    return _build_recall(args) if args.mqar else _build_text(args)


def _build_text(args: argparse.Namespace) -> int:
    from slotmamba_data.build import build_text
    from slotmamba_data.text import DOCUMENT_BYTES
    from slotmamba_data.tokenizer import Tokenizer

    if not args.input or args.tokenizer is None:
        raise InputError("building text needs --input and --tokenizer (or give --mqar for recall samples)")
    document_bytes = DOCUMENT_BYTES if args.document_kib is None else args.document_kib * 1024 or None
    manifests = build_text(
        args.input,
        Tokenizer(args.tokenizer),
        args.output,
        validation=args.validation or 0.0,
        document_bytes=document_bytes,
        shard_bytes=args.shard_mib * 2**20,
        overwrite=args.overwrite,
    )
    for split, manifest in manifests.items():
        print(
            f"{split:<11} {manifest.documents:,} documents, {manifest.tokens:,} tokens, {len(manifest.shards)} shards"
        )
    print(f"written to  {args.output}")
    return 0


def _build_recall(args: argparse.Namespace) -> int:
    from slotmamba_data.build import build_mqar
    from slotmamba_data.mqar_spec import MQARSpec

    if not args.setting:
        raise InputError("building recall samples needs --setting LENGTH:PAIRS:COUNT, e.g. --setting 64:4:1000")
    settings, counts = zip(*map(_parse_setting, args.setting), strict=True)
    chosen = {name: getattr(args, name) for name in ("vocab_size", "form", "fillers", "power")}
    spec = MQARSpec(settings, **{name: value for name, value in chosen.items() if value is not None})
    manifest = build_mqar(
        spec, counts, args.output, seed=args.seed or 0, shard_bytes=args.shard_mib * 2**20, overwrite=args.overwrite
    )
    print(f"recall      {manifest.documents:,} samples, {manifest.tokens:,} tokens, {len(manifest.shards)} shards")
    print(f"written to  {args.output}")
    return 0


def _parse_setting(word: str) -> tuple[MQARSetting, int]:
    from slotmamba_data.mqar_spec import MQARSetting

    try:
        length, pairs, count = map(int, word.split(":"))
    except ValueError as error:
        raise InputError(f"--setting {word}: expected LENGTH:PAIRS:COUNT, e.g. 64:4:1000") from error
    return MQARSetting(length, pairs), count


def _inspect(args: argparse.Namespace) -> int:
    from slotmamba_data.manifest import MANIFEST_NAME
    from slotmamba_data.shard_reader import ShardFolder

    folder = ShardFolder(args.folder.parent if args.folder.name == MANIFEST_NAME else args.folder)
    folder.verify()
    manifest = folder.manifest
    size = sum(entry.bytes for entry in manifest.shards)
    print(f"{folder.path}: every byte is as it was written")
    print(f"kind        {manifest.kind}, {manifest.form}, vocabulary of {manifest.vocab_size:,}")
    print(f"contents    {manifest.documents:,} documents, {manifest.tokens:,} tokens")
    print(f"files       {len(manifest.shards)} shards, {size:,} bytes")
    if manifest.tokenizer is not None:
        print(f"tokenizer   sha256 {manifest.tokenizer[:16]}")
    _print_lengths(folder)
    if args.tokenizer is not None:
        _print_document(folder, args.tokenizer, args.document)
    folder.close()
    return 0


def _print_lengths(folder: Any) -> None:
    """A histogram of document lengths in powers of two."""
    import numpy as np

    bins = np.bincount(np.floor(np.log2(folder.counts)).astype(int))
    print("tokens of a document")
    for power in np.flatnonzero(bins):
        bar = "#" * max(1, round(40 * bins[power] / bins.max()))
        print(f"  {2**power:>9,} to {2 ** (power + 1) - 1:>9,}  {bins[power]:>9,}  {bar}")


def _print_document(folder: Any, path: Path, document: int) -> None:
    from slotmamba_data.tokenizer import Tokenizer

    tokenizer = Tokenizer(path)
    if folder.manifest.tokenizer != tokenizer.digest:
        raise InputError(
            f"{folder.path} was not made with tokenizer {tokenizer.path}: its digest is {tokenizer.digest[:16]}"
        )
    if not 0 <= document < folder.manifest.documents:
        raise InputError(f"--document {document}: {folder.path} has documents 0 to {folder.manifest.documents - 1}")
    tokens = folder.tokens(document, 0, min(128, int(folder.counts[document])))
    print(f"document {document} begins")
    print(tokenizer.decode(tokens.tolist()))
