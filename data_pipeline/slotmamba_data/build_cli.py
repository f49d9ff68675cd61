"""`slotmamba data build`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from slotmamba_data.errors import InputError

if TYPE_CHECKING:
    from types import TracebackType

    from slotmamba_data.manifest import Manifest
    from slotmamba_data.mqar_spec import MQARSetting
    from slotmamba_data.pieces import Report

INPUT_HELP = (
    "UTF-8 text or .jsonl file (plain, .xz, .gz or .zst), .parquet file, or austen:train, austen:val, austen:test; "
    "repeatable"
)


def add_build(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "build",
        help="write shards",
        description="Write shards of tokenised text, or of associative recall samples (--mqar).",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the shards")
    parser.add_argument("--shard-mib", type=int, default=256, metavar="MIB", help="size of a shard (default: 256)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes; they change nothing but the time (default: one per core)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a complete folder")
    text = parser.add_argument_group("text")
    text.add_argument("--input", nargs="+", action="extend", metavar="FILE", help=INPUT_HELP)
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
    text.add_argument("--text-field", metavar="NAME", help="JSON field or column with the text (default: text)")
    text.add_argument(
        "--deduplicate", action="store_true", default=None, help="of documents of the same text keep the first"
    )
    text.add_argument(
        "--skip-bad", action="store_true", default=None, help="leave out and count what is no document (not JSON)"
    )
    recall = parser.add_argument_group("recall")
    recall.add_argument("--mqar", action="store_true", help="write multi-query associative recall instead of text")
    recall.add_argument(
        "--setting",
        nargs="+",
        action="extend",
        metavar="LENGTH:PAIRS:COUNT[:UPDATES[:PASSES]]",
        help="samples to write, e.g. 64:4:1000, or 64:4:1000:2 with 2 keys written again, or 64:4:1000:0:2 with all "
        "pairs shown twice; repeatable",
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
    recall.add_argument(
        "--stream",
        metavar="NAME",
        help="name of this set (default: build); train/NAME makes the samples of a recipe's generated source NAME",
    )
    parser.set_defaults(handler=_build)


def _build(args: argparse.Namespace) -> int:
    text_only = ("input", "tokenizer", "validation", "document_kib", "text_field", "deduplicate", "skip_bad")
    recall_only = ("setting", "vocab_size", "form", "fillers", "power", "seed", "stream")
    wrong = [name for name in (text_only if args.mqar else recall_only) if getattr(args, name) is not None]
    if wrong:
        what = "recall samples (--mqar)" if args.mqar else "text (without --mqar)"
        raise InputError(f"--{wrong[0].replace('_', '-')} has no meaning for {what}")
    if args.shard_mib < 1:
        raise InputError(f"--shard-mib {args.shard_mib}: expected at least 1")
    manifests = _build_recall(args) if args.mqar else _build_text(args)
    _print(manifests)
    print(f"written to  {args.output}")
    return 0


def _common(args: argparse.Namespace) -> dict[str, Any]:
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    return {"shard_bytes": args.shard_mib * 2**20, "workers": workers, "overwrite": args.overwrite}


def _build_text(args: argparse.Namespace) -> dict[str, Manifest]:
    from slotmamba_data.build import build_text
    from slotmamba_data.text import DOCUMENT_BYTES
    from slotmamba_data.tokenizer import Tokenizer

    if not args.input or args.tokenizer is None:
        raise InputError("building text needs --input and --tokenizer (or give --mqar for recall samples)")
    if args.document_kib is not None and args.document_kib < 0:
        raise InputError(f"--document-kib {args.document_kib}: expected at least 1, or 0 for whole files")
    document_bytes = DOCUMENT_BYTES if args.document_kib is None else args.document_kib * 1024 or None
    with _Bar() as bar:
        return build_text(
            args.input,
            Tokenizer(args.tokenizer),
            args.output,
            validation=args.validation or 0.0,
            document_bytes=document_bytes,
            text_field=args.text_field or "text",
            deduplicate=bool(args.deduplicate),
            skip_bad=bool(args.skip_bad),
            display=bar,
            **_common(args),
        )


def _build_recall(args: argparse.Namespace) -> dict[str, Manifest]:
    from slotmamba_data.build import build_mqar
    from slotmamba_data.mqar_spec import MQARSpec

    if not args.setting:
        raise InputError("building recall samples needs --setting LENGTH:PAIRS:COUNT, e.g. --setting 64:4:1000")
    settings, counts = zip(*map(_parse_setting, args.setting), strict=True)
    chosen = {name: getattr(args, name) for name in ("vocab_size", "form", "fillers", "power")}
    spec = MQARSpec(settings, **{name: value for name, value in chosen.items() if value is not None})
    with _Bar() as bar:
        named = {} if args.stream is None else {"stream": args.stream}
        manifest = build_mqar(spec, counts, args.output, seed=args.seed or 0, display=bar, **named, **_common(args))
        return {"recall": manifest}


def _parse_setting(word: str) -> tuple[MQARSetting, int]:
    from slotmamba_data.mqar_spec import MQARSetting

    try:
        length, pairs, count, *special = map(int, word.split(":"))
        updates, passes = (*special, *(0, 1)[len(special) :])
    except ValueError as error:
        raise InputError(f"--setting {word}: expected LENGTH:PAIRS:COUNT[:UPDATES[:PASSES]], e.g. 64:4:1000") from error
    return MQARSetting(length, pairs, updates=updates, passes=passes), count


def _print(manifests: Mapping[str, Manifest]) -> None:
    for split, manifest in manifests.items():
        print(
            f"{split:<11} {manifest.documents:,} documents, {manifest.tokens:,} tokens, {len(manifest.shards)} shards"
        )
        for name, count in manifest.sources.items():
            left_out = "".join(f"; {number:,} left out ({reason})" for reason, number in sorted(count.skipped.items()))
            print(f"  {name}: {count.documents:,} documents, {count.tokens:,} tokens{left_out}")


class _Bar:
    """A progress bar on a terminal's stderr: throughput and time left."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._documents = self._tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def phase(self, name: str, unit: str, total: float, done: float) -> None:
        from tqdm import tqdm

        if self._bar is not None:
            self._bar.close()
        self._bar = tqdm(
            desc=name,
            unit=unit,
            unit_scale=True,
            unit_divisor=1024 if unit == "B" else 1000,
            total=total,
            initial=done,
            disable=None if sys.stderr.isatty() else True,
            file=sys.stderr,
        )
        self._documents = self._tokens = 0

    def update(self, report: Report) -> None:
        self._documents += report.documents
        self._tokens += report.tokens
        if self._tokens:
            elapsed = max(self._bar.format_dict["elapsed"], 1e-9)
            self._bar.set_postfix_str(
                f"{self._documents:,} documents, {self._tokens / elapsed / 1e6:.2f}M tokens/s", refresh=False
            )
        self._bar.update(report.work)
