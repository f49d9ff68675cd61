"""Build folders of shards: from text with a tokenizer, and from recall settings."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from slotmamba_data.duplicates import duplicates_file, find_duplicates, hashes_file
from slotmamba_data.errors import InputError
from slotmamba_data.files import naming, sync_folder, write_file
from slotmamba_data.inputs import describe, pieces
from slotmamba_data.manifest import FORMAT, MANIFEST_NAME, Manifest, ShardEntry, SourceCount, add_counts
from slotmamba_data.mqar_spec import MQARSpec
from slotmamba_data.pieces import Built, Job, Report, build_piece, for_each, piece_record, workers_lock
from slotmamba_data.recall_job import RecallJob
from slotmamba_data.shards import SHARD_BYTES, clear, token_dtype
from slotmamba_data.text import DOCUMENT_BYTES, TextOptions
from slotmamba_data.text_job import TextJob, hash_piece
from slotmamba_data.tokenizer import Tokenizer

WORK = ".build"  # folder in the output for what is not finished
_SETTINGS = "settings.json"
_MOVING = "moving"  # says that the finished shards are being moved to where they belong


class Display(Protocol):
    """Shows how far a build is."""

    def phase(self, name: str, unit: str, total: float, done: float) -> None:
        """A phase begins, of which `done` of `total` was done by an earlier call."""
        ...

    def update(self, report: Report) -> None: ...


class _Silent:
    def phase(self, name: str, unit: str, total: float, done: float) -> None: ...

    def update(self, report: Report) -> None: ...


@dataclass(frozen=True)
class _Plan:
    """All that a folder of shards depends on; `settings` is what a build must share with one that it continues."""

    job: Job
    kind: Literal["lm", "mqar"]
    form: Literal["decoder", "seq2seq"]
    vocab_size: int
    tokenizer: str | None
    about: dict[str, Any]
    settings: dict[str, Any]


def build_text(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer,
    output: Path,
    *,
    validation: float = 0.0,
    document_bytes: int | None = DOCUMENT_BYTES,
    text_field: str = "text",
    deduplicate: bool = False,
    skip_bad: bool = False,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    overwrite: bool = False,
    display: Display | None = None,
) -> dict[str, Manifest]:
    """Tokenise documents, `beginning text end` each, into shards; empty documents are left out.

    The shards depend on the inputs and settings, not on the number of workers. After a kill or an error of the system
    the same call goes on behind the last finished shards, which are in `output/.build` until all are.

    Args:
        inputs: what `text.open_text` takes.
        tokenizer: turns text into tokens.
        output: folder of the shards; with a validation share its folders `train` and `val` are.
        validation: share of the documents, by digest of their text, for validation: equal texts stay together.
        document_bytes, text_field: as in `text.TextOptions`.
        deduplicate: of documents with the same text keep the first.
        skip_bad: leave out what is not a document (a line that is not JSON) and count it, instead of an error.
        shard_bytes: size at which a shard is closed.
        workers: processes that tokenise.
        overwrite: replace folders that are complete.
        display: shows progress.

    Returns:
        The manifests, by split: `train`, and `val` with a validation share.

    Raises:
        InputError: an input cannot be read, the output is complete already, or a split got no document.
        ChildProcessError: a worker died.
        OSError: the output cannot be written; no folder is complete then.
    """
    if not 0 <= validation < 1:
        raise InputError(f"validation={validation}: expected a share from 0 to below 1")
    specs = [str(spec) for spec in inputs]
    options = TextOptions(document_bytes, text_field)
    job = TextJob(
        pieces=tuple(pieces(specs, _checked(shard_bytes))),
        options=options,
        tokenizer=tokenizer,
        validation=validation,
        skip_bad=skip_bad,
        shard_bytes=shard_bytes,
        duplicates=output / WORK if deduplicate else None,
    )
    about = {
        "inputs": specs,
        "document_bytes": document_bytes,
        "text_field": text_field,
        "validation": validation,
        "deduplicate": deduplicate,
        "skip_bad": skip_bad,
        "shard_bytes": shard_bytes,
    }
    settings = {**about, "tokenizer": tokenizer.digest, "files": [describe(spec) for spec in specs]}
    plan = _Plan(job, "lm", "decoder", tokenizer.vocab_size, tokenizer.digest, about, settings)

    def prepare(work: Path, display: Display) -> None:
        if deduplicate:
            _find_duplicates(job, work, workers, display)

    return _build(plan, output, workers, overwrite, display or _Silent(), prepare)


def build_mqar(
    spec: MQARSpec,
    counts: Sequence[int],
    output: Path,
    *,
    seed: int = 0,
    stream: str = "build",
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    overwrite: bool = False,
    display: Display | None = None,
) -> Manifest:
    """Write recall samples with their labels into shards; goes on after a kill as `build_text` does.

    Args:
        spec: the samples; the weights of its settings do not matter here.
        counts: samples of each setting, in order.
        output: folder of the shards.
        seed: of the samples, 0 to 2^63 - 1.
        stream: name that separates sets of samples of the same seed; that of a plan's generated source is SPLIT/NAME.
        shard_bytes: size at which a shard is closed.
        workers: processes that make samples.
        overwrite: replace a folder that is complete.
        display: shows progress.

    Raises:
        InputError: a count below 1, a seed that no recipe can have, or the output is complete already.
        ChildProcessError: a worker died.
        OSError: the output cannot be written; it is not complete then.
    """
    if len(counts) != len(spec.settings) or min(counts) < 1:
        raise InputError(
            f"counts of samples {list(counts)}: expected one of at least 1 for each of {len(spec.settings)} settings"
        )
    if not 0 <= seed < 2**63:
        raise InputError(f"seed={seed}: expected 0 to 2^63 - 1, as in a recipe")
    job = RecallJob.of(spec, counts, seed, stream, _checked(shard_bytes))
    about = {**job.about(), "shard_bytes": shard_bytes}
    plan = _Plan(job, "mqar", spec.form, spec.vocab_size, None, about, about)
    return _build(plan, output, workers, overwrite, display or _Silent(), lambda work, display: None)["train"]


def _checked(shard_bytes: int) -> int:
    if shard_bytes < 1:
        raise InputError(f"shard_bytes={shard_bytes}: expected at least 1")
    return shard_bytes


def _build(
    plan: _Plan,
    output: Path,
    workers: int,
    overwrite: bool,
    display: Display,
    prepare: Callable[[Path, Display], None],
) -> dict[str, Manifest]:
    if workers < 1:
        raise InputError(f"workers={workers}: expected at least 1")
    with _alone(output):
        return _build_alone(plan, output, workers, overwrite, display, prepare)


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keep other builds from the same folder, and wait for the workers of one that was killed.

    Raises:
        InputError: another build is at work.
    """
    path = output / f"{WORK}.lock"
    with naming(output):
        output.mkdir(parents=True, exist_ok=True)
    with naming(path), open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except (BlockingIOError, FileNotFoundError):
            free = False
        if not free:
            raise InputError(f"another `slotmamba data build` is writing to {output}, or was just now")
        try:
            if workers_lock(output / WORK).exists():
                with open(workers_lock(output / WORK), "a") as workers:
                    fcntl.flock(workers, fcntl.LOCK_EX)
            yield
        finally:
            path.unlink()


def _build_alone(
    plan: _Plan,
    output: Path,
    workers: int,
    overwrite: bool,
    display: Display,
    prepare: Callable[[Path, Display], None],
) -> dict[str, Manifest]:
    splits = plan.job.splits
    folders = {split: output / split if len(splits) > 1 else output for split in splits}
    work = output / WORK
    goes_on = _is_from(work, plan.settings)
    if not (goes_on and (work / _MOVING).is_file()):
        for folder in folders.values():
            if (folder / MANIFEST_NAME).exists() and not overwrite:
                raise InputError(f"{folder} is a complete folder of shards: choose another output, or overwrite it")
    if not goes_on:
        _begin(work, plan.settings)
    try:
        if not (work / _MOVING).is_file():
            prepare(work, display)
        built = _build_pieces(plan.job, work, workers, display)
        found = {split: [entry for piece in built for entry in piece.shards[split]] for split in splits}
        manifests = {split: _manifest(plan, split, found[split], built) for split in splits}
        _check_documents(manifests)
    except InputError:
        shutil.rmtree(work)  # the input has to change, and then nothing of it can be used
        raise
    write_file(work / _MOVING, b"")
    for split, manifest in manifests.items():
        _publish(manifest, found[split], work / split, folders[split])
    shutil.rmtree(work)
    return manifests


def _is_from(work: Path, settings: Mapping[str, Any]) -> bool:
    """Whether an unfinished build of the same settings is there."""
    path = work / _SETTINGS
    return path.is_file() and path.read_bytes() == _encoded(settings)


def _encoded(settings: Mapping[str, Any]) -> bytes:
    return json.dumps({"format": FORMAT, **settings}, indent=1).encode()


def _begin(work: Path, settings: Mapping[str, Any]) -> None:
    if work.exists():
        shutil.rmtree(work)
    with naming(work):
        work.mkdir(parents=True)
    write_file(work / _SETTINGS, _encoded(settings))


def _build_pieces(job: Job, work: Path, workers: int, display: Display) -> list[Built]:
    """What all pieces became, in their order; only those are built that are not yet."""
    _do_missing("shards", build_piece, piece_record, job, work, workers, display)
    return [Built.from_json(piece_record(work, number).read_bytes()) for number in range(len(job.work))]


def _do_missing(
    phase: str,
    task: Callable[[Any, int, Path], Iterator[Any]],
    finished: Callable[[Path, int], Path],
    job: Job,
    work: Path,
    workers: int,
    display: Display,
) -> None:
    """Do `task` for the pieces whose file `finished` does not exist yet, and show how far it is."""
    missing = [number for number in range(len(job.work)) if not finished(work, number).is_file()]
    total = sum(job.work)
    display.phase(phase, job.unit, total, total - sum(job.work[number] for number in missing))
    for _ in for_each(task, job, work, missing, workers, display.update):
        pass


def _find_duplicates(job: TextJob, work: Path, workers: int, display: Display) -> None:
    _do_missing("hashes", hash_piece, hashes_file, job, work, workers, display)
    numbers = range(len(job.work))
    if not all(duplicates_file(work, number).is_file() for number in numbers):
        display.phase("duplicates", "", 1, 0)
        find_duplicates(work, len(numbers), lambda share: display.update(Report(share, 0, 0)))


def _manifest(plan: _Plan, split: str, found: Sequence[ShardEntry], built: Sequence[Built]) -> Manifest:
    """The manifest of a split; the shards that were found get the names that they will have."""
    names = [f"shard-{number:06d}" for number in range(len(found))]
    shards = tuple(
        replace(entry, name=f"{name}.tar", index=f"{name}.index.npz") for name, entry in zip(names, found, strict=True)
    )
    sources: dict[str, SourceCount] = {}
    for piece in built:
        add_counts(sources, piece.sources[split])
    return Manifest(
        format=FORMAT,
        kind=plan.kind,
        form=plan.form,
        vocab_size=plan.vocab_size,
        tokenizer=plan.tokenizer,
        token_dtype=token_dtype(plan.vocab_size).name,
        documents=sum(entry.documents for entry in shards),
        tokens=sum(entry.tokens for entry in shards),
        shards=shards,
        sources=dict(sorted(sources.items())),
        about={**plan.about, "split": split},
    )


def _check_documents(manifests: Mapping[str, Manifest]) -> None:
    total = sum(manifest.documents for manifest in manifests.values())
    if not total:
        raise InputError(_nothing(next(iter(manifests.values())).about["inputs"], manifests.values()))
    for split, manifest in manifests.items():
        if not manifest.documents:
            raise InputError(
                f"no document went to {split}: the input has {total}; "
                "cut smaller ones (--document-kib) or change the share (--validation)"
            )


def _nothing(inputs: Sequence[str], manifests: Iterable[Manifest]) -> str:
    """Says that inputs gave no document, and what was in them instead."""
    skipped: Counter[str] = Counter()
    for manifest in manifests:
        for count in manifest.sources.values():
            skipped.update(count.skipped)
    what = ", ".join(f"{number:,} left out ({reason})" for reason, number in sorted(skipped.items()))
    more = f" and {len(inputs) - 3:,} more" if len(inputs) > 3 else ""
    return f"there are no documents in {', '.join(inputs[:3])}{more}: {what or 'nothing is in there'}"


def _publish(manifest: Manifest, found: Sequence[ShardEntry], source: Path, target: Path) -> None:
    """Move the shards of a split to their folder and write its manifest; also where an earlier call was killed."""
    marker = source.with_name(f"{_MOVING}-{source.name}")  # what was in the folder before is gone
    with naming(target):
        target.mkdir(parents=True, exist_ok=True)
        if not marker.exists():
            clear(target)
            write_file(marker, b"")
        for old, new in zip(found, manifest.shards, strict=True):
            for before, after in ((old.name, new.name), (old.index, new.index)):
                if (source / before).exists():
                    os.rename(source / before, target / after)
        sync_folder(target)
    manifest.write(target)
