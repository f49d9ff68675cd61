"""`slotmamba data tokenizer | build | inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from slotmamba_data.build_cli import add_build
from slotmamba_data.errors import InputError
from slotmamba_data.tokenizer_cli import add_tokenizer_command


def add_data_commands(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add `data` and its three commands; each leaf sets `handler`, a function from the namespace to an exit code.

    The handlers raise InputError for what the user can correct and OSError for what the system refused.
    """
    data = subparsers.add_parser("data", help="tokenizers and shards", description="Make and check training data.")
    commands = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    add_tokenizer_command(commands)
    add_build(commands)
    _add_inspect(commands)


def _add_inspect(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "inspect", help="check shards", description="Check every byte of a folder of shards and describe it."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of shards, or its manifest.json")
    parser.add_argument("--tokenizer", type=Path, metavar="MODEL", help="print the beginning of a document as text")
    parser.add_argument("--document", type=int, default=0, metavar="N", help="which document to print (default: 0)")
    parser.set_defaults(handler=_inspect)


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
