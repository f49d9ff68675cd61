"""`slotmamba data inspect`: a folder of shards, or the data of a recipe."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slotmamba_data.errors import InputError
from slotmamba_data.files import write_file
from slotmamba_data.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from slotmamba_data.inspection import Lengths
    from slotmamba_data.plan import Plan
    from slotmamba_data.shard_reader import ShardFolder
    from slotmamba_data.tokenizer import Tokenizer

_MEASURED = 4 * 2**20  # tokens
_SHOWN = 400  # characters of a document, tokens of a recall sample


@dataclass(frozen=True)
class PlannedRun:
    """The data of a recipe: its plan, how many rows the run has and each step takes, and its tokenizer's path."""

    name: str
    plan: Plan
    rows: int
    rows_per_step: int
    tokenizer: str | None


PlanOf = Callable[[str, Sequence[str]], PlannedRun]
"""Loads a recipe, with overrides, and opens its plan."""


def add_inspect(commands: argparse._SubParsersAction[Any], plan_of: PlanOf | None) -> None:
    """Add the command; without `plan_of` it knows folders only."""
    parser = commands.add_parser(
        "inspect",
        help="check and describe shards, or the data of a recipe",
        description="Check every byte of a folder of shards and describe it, or describe the data of a recipe: "
        "documents and tokens by source, lengths, the mixture and its rows.",
    )
    parser.add_argument("target", metavar="TARGET", help="folder of shards, its manifest.json or its URL, or a recipe")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="recipe keys to set")
    parser.add_argument("--output", type=Path, metavar="DIR", help="also write inspect.json and pictures there")
    parser.add_argument("--duplicates", action="store_true", help="count documents that are there more than once")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="print documents as text (a recipe names its own)"
    )
    shards = parser.add_argument_group("folders of shards")
    shards.add_argument("--document", type=int, metavar="N", help="which document to print (default: 0)")
    shards.add_argument("--quick", action="store_true", default=None, help="do not read every byte")
    recipe = parser.add_argument_group("recipes")
    recipe.add_argument("--at", type=int, metavar="ROW", help="only print what this row holds, and where it comes from")
    recipe.add_argument("--rows", type=int, metavar="N", help="how many rows to print (default: 2)")
    recipe.add_argument("--workers", metavar="N,...", help="measure how fast so many processes read, e.g. 0,1,2,4")
    parser.set_defaults(handler=lambda args: _inspect(args, plan_of))


def _inspect(args: argparse.Namespace, plan_of: PlanOf | None) -> int:
    folder = _folder(args.target)
    only = {"document": args.document, "quick": args.quick} if folder is None else {}
    if folder is not None:
        only = {"at": args.at, "rows": args.rows, "workers": args.workers, "key=value": args.overrides or None}
    wrong = [name for name, value in only.items() if value is not None]
    if wrong:
        option = wrong[0] if "=" in wrong[0] else f"--{wrong[0]}"
        raise InputError(f"{option} has no meaning for {'a recipe' if folder is None else 'a folder of shards'}")
    if folder is not None:
        return _inspect_folder(args, folder)
    if plan_of is None:
        raise InputError(f"{args.target} is not a folder of shards")
    run = plan_of(args.target, args.overrides)
    with closing(run.plan):
        return _inspect_run(args, run)


def _folder(target: str) -> str | None:
    """The path or URL of a folder of shards, None where the target is none and so has to be a recipe."""
    from slotmamba_data.store import is_url

    if is_url(target):
        return target.removesuffix(f"/{MANIFEST_NAME}")
    path = Path(target)
    if path.name == MANIFEST_NAME:
        return str(path.parent)
    return target if path.is_dir() else None


def _inspect_folder(args: argparse.Namespace, location: str) -> int:
    from slotmamba_data.inspection import Lengths, count_duplicates
    from slotmamba_data.shard_reader import ShardFolder

    with closing(ShardFolder(location)) as folder:
        if not args.quick:
            folder.verify()
            print(f"{folder.location}: every byte is as it was written")
        manifest = folder.manifest
        size = sum(entry.bytes for entry in manifest.shards)
        print(f"kind        {manifest.kind}, {manifest.form}, vocabulary of {manifest.vocab_size:,}")
        print(f"contents    {manifest.documents:,} documents, {manifest.tokens:,} tokens")
        print(f"files       {len(manifest.shards)} shards, {size:,} bytes")
        if manifest.tokenizer is not None:
            print(f"tokenizer   sha256 {manifest.tokenizer[:16]}")
        _print_sources([folder])
        lengths = Lengths.of([folder])
        _print_lengths(lengths)
        found: dict[str, Any] = {"manifest": asdict(manifest), "lengths": list(lengths.ranges())}
        if args.duplicates:
            found["duplicates"] = _print_duplicates(*count_duplicates([folder]), manifest.documents)
        if args.tokenizer is not None:
            _print_document(folder, args.tokenizer, args.document or 0)
    _write(args.output, found, lengths, {})
    return 0


def _inspect_run(args: argparse.Namespace, run: PlannedRun) -> int:
    from slotmamba_data import inspect_plots
    from slotmamba_data.inspection import Lengths, count_duplicates, planned_sources, shares_over_time, throughput
    from slotmamba_data.tokenizer import Tokenizer

    workers = _numbers(args.workers)
    if args.rows is not None and args.rows < 0:
        raise InputError(f"--rows {args.rows}: expected at least 0")
    path = args.tokenizer or run.tokenizer
    tokenizer = None if path is None else Tokenizer(path)
    if args.at is not None:
        if args.at < 0:
            raise InputError(f"--at {args.at}: rows are numbered from 0")
        if args.at >= run.rows:
            print(f"the run ends after row {run.rows - 1:,}")
        _print_row(run, args.at, tokenizer)
        return 0
    plan = run.plan
    print(f"{run.name}: {run.rows:,} rows of {plan.seq_len:,} tokens, {run.rows_per_step:,} a step")
    if (ends := plan.ends()) is not None:
        print(f"            source {ends[1]!r} is exhausted after row {ends[0]:,}")
    sources = planned_sources(plan, run.rows)
    _print_mixture(sources)
    found: dict[str, Any] = {
        "recipe": run.name,
        "rows": run.rows,
        "seq_len": plan.seq_len,
        "sources": [asdict(source) for source in sources],
    }
    ends_at, shares = shares_over_time(plan, run.rows)
    names = [source.name for source in plan.sources]
    pictures = {"mixture.png": inspect_plots.shares_picture(names, ends_at, shares)} if args.output else {}
    folders = [folder for folder in map(plan.folder, range(len(names))) if folder is not None]
    lengths = None
    if folders:
        _print_sources(folders)
        lengths = Lengths.of(folders)
        found["lengths"] = list(lengths.ranges())
        _print_lengths(lengths)
        if args.duplicates:
            documents = sum(folder.manifest.documents for folder in folders)
            found["duplicates"] = _print_duplicates(*count_duplicates(folders), documents)
    for number in range(2 if args.rows is None else args.rows):
        _print_row(run, number, tokenizer)
    if workers:
        batch = max(1, _MEASURED // 16 // plan.seq_len)
        speeds = throughput(plan, batch, 16, workers)
        found["tokens_per_second"] = speeds
        print("reading: million tokens a second by number of workers (0: in the training process)")
        for count, speed in speeds.items():
            print(f"  {count:>3}  {speed / 1e6:>8.1f}")
        if args.output:
            pictures["throughput.png"] = inspect_plots.throughput_picture(speeds)
    _write(args.output, found, lengths, pictures)
    return 0


def _numbers(words: str | None) -> list[int]:
    numbers = [] if words is None else words.split(",")
    if not all(number.isdecimal() for number in numbers):
        raise InputError(f"--workers {words}: expected whole numbers, such as 0,1,2,4")
    return list(map(int, numbers))


def _write(output: Path | None, found: dict[str, Any], lengths: Lengths | None, pictures: dict[str, bytes]) -> None:
    if output is None:
        return
    from slotmamba_data.inspect_plots import lengths_picture

    output.mkdir(parents=True, exist_ok=True)
    if lengths is not None:
        pictures = {"lengths.png": lengths_picture(lengths), **pictures}
    for name, picture in pictures.items():
        write_file(output / name, picture)
    write_file(output / "inspect.json", (json.dumps(found, indent=1) + "\n").encode())
    print(f"written to  {output}: inspect.json, {', '.join(pictures)}")


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns two spaces apart, the first aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for first, *others in (header, *rows):
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join(["  " + first.ljust(widths[0]), *cells]))


def _print_mixture(sources: Sequence[Any]) -> None:
    def number(value: int | None) -> str:
        return "endless" if value is None else f"{value:,}"

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    print("sources")
    _print_table(
        (
            "name",
            "kind",
            "documents",
            "tokens",
            "rows/epoch",
            "padding",
            "cut",
            "asked",
            "first 10k",
            "run",
            "of tokens",
            "epochs",
        ),
        [
            (
                each.name,
                each.kind,
                number(each.documents),
                number(each.tokens),
                number(each.rows_per_epoch),
                share(each.pad_share),
                share(each.cut_share),
                share(each.asked[0])
                if each.asked[0] == each.asked[1]
                else f"{each.asked[0]:.2%} to {each.asked[1]:.2%}",
                share(each.realised[0]),
                share(each.realised[1]),
                share(each.tokens_share),
                "" if each.epochs is None else f"{each.epochs:.2f}",
            )
            for each in sources
        ],
    )


def _print_sources(folders: Sequence[ShardFolder]) -> None:
    """Documents and tokens by the source that the shards were built from."""
    rows = []
    for folder in folders:
        for name, count in folder.manifest.sources.items():
            skipped = ", ".join(f"{number:,} {reason}" for reason, number in count.skipped.items())
            mean = count.tokens / max(1, count.documents)
            rows.append((name, f"{count.documents:,}", f"{count.tokens:,}", f"{mean:,.0f}", skipped))
    if rows:
        print("built from")
        _print_table(("source", "documents", "tokens", "tokens each", "left out"), rows)


def _print_lengths(lengths: Lengths) -> None:
    """A histogram of document lengths in powers of two."""
    most = max(lengths.buckets)
    print("tokens of a document")
    for first, last, documents in lengths.ranges():
        bar = "#" * max(1, round(40 * documents / most))
        print(f"  {first:>9,} to {last:>9,}  {documents:>9,}  {bar}")


def _print_duplicates(documents: int, tokens: int, of: int) -> dict[str, int]:
    print(f"duplicates  {documents:,} of {of:,} documents are there before, {tokens:,} tokens")
    return {"documents": documents, "tokens": tokens}


def _print_document(folder: ShardFolder, path: Path, document: int) -> None:
    from slotmamba_data.tokenizer import Tokenizer

    tokenizer = Tokenizer(path)
    if folder.manifest.tokenizer != tokenizer.digest:
        raise InputError(
            f"{folder.location} was not made with tokenizer {tokenizer.path}: its digest is {tokenizer.digest[:16]}"
        )
    if not 0 <= document < folder.manifest.documents:
        raise InputError(f"--document {document}: {folder.location} has documents 0 to {folder.manifest.documents - 1}")
    tokens = folder.tokens(document)[:128]
    print(f"document {document} begins")
    print(tokenizer.decode(tokens.tolist()))


def _print_row(run: PlannedRun, number: int, tokenizer: Tokenizer | None) -> None:
    """What a row holds and where it comes from."""
    plan = run.plan
    index, turn = plan.locate(number)
    source, row = plan.sources[index], plan[number]
    print(f"row {number:,}, of step {number // run.rows_per_step + 1:,}: row {turn:,} of source {source.name!r}")
    position = 0
    for part, origin in zip(row.documents, plan.origins(row), strict=True):
        past = position + part.stop - part.start
        print(
            f"  positions {position:,} to {past - 1:,}: tokens {part.start:,} to {part.stop - 1:,} of document "
            f"{part.document:,}, epoch {part.epoch}"
        )
        print(f"    {origin}")
        tokens = row.tokens[position:past].tolist()
        if source.kind == "lm" and tokenizer is not None:
            text = tokenizer.decode(tokens)
            print(f"    {text[:_SHOWN]!r}{' ...' if len(text) > _SHOWN else ''}")
        else:
            labels = row.labels[position:past].tolist() if source.kind == "mqar" else [-1] * len(tokens)
            asked = (
                f"{token}={label}" if label >= 0 else str(token) for token, label in zip(tokens, labels, strict=True)
            )
            print(f"    {' '.join(itertools.islice(asked, _SHOWN // 4))}{' ...' if len(tokens) > _SHOWN // 4 else ''}")
        position = past
    if position < plan.seq_len:
        print(f"  positions {position:,} to {plan.seq_len - 1:,}: padding")
    if row.skipped:
        print(f"  {row.skipped} documents cannot be read and are left out")
