"""Build folders of shards: from text with a tokenizer, and from recall settings."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from slotmamba_data.errors import InputError
from slotmamba_data.manifest import Manifest
from slotmamba_data.mqar import generate_mqar
from slotmamba_data.mqar_spec import MQARSetting, MQARSpec
from slotmamba_data.shards import SHARD_BYTES, ShardWriter
from slotmamba_data.text import DOCUMENT_BYTES, open_text
from slotmamba_data.tokenizer import Tokenizer

_CHUNK = 256  # recall samples generated at once


def build_text(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer,
    output: Path,
    *,
    validation: float = 0.0,
    document_bytes: int | None = DOCUMENT_BYTES,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> dict[str, Manifest]:
    """Tokenise documents, `beginning text end` each, into shards; empty documents are left out.

    Args:
        inputs: what `text.open_text` takes.
        tokenizer: turns text into tokens.
        output: folder of the shards; with a validation share its folders `train` and `val` are.
        validation: share of the documents, by digest of their text, for validation: equal texts stay together.
        document_bytes: size at which plain text files are cut into documents; None keeps each file whole.
        shard_bytes: size at which a shard is closed.
        overwrite: replace folders that are complete.

    Returns:
        The manifests, by split: `train`, and `val` with a validation share.

    Raises:
        InputError: an input cannot be read, the output is complete already, or a split got no document.
        OSError: the output cannot be written; no folder is complete then. After a kill at least one of them is not.
    """
    if not 0 <= validation < 1:
        raise InputError(f"validation={validation}: expected a share from 0 to below 1")
    about = {"inputs": [str(spec) for spec in inputs], "document_bytes": document_bytes, "validation": validation}
    folders = {"train": output / "train", "val": output / "val"} if validation else {"train": output}
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(
                    folder,
                    vocab_size=tokenizer.vocab_size,
                    tokenizer=tokenizer.digest,
                    shard_bytes=shard_bytes,
                    about={**about, "split": split},
                    overwrite=overwrite,
                )
            )
            for split, folder in folders.items()
        }
        for spec in inputs:
            for text in open_text(spec, document_bytes=document_bytes):
                if text:
                    split = "val" if _share(text) < validation else "train"
                    writers[split].add(_tokens(tokenizer, text), meta={"input": str(spec)})
        for split, writer in writers.items():
            if not writer.documents:
                raise InputError(
                    f"no document went to {split}: the input has {sum(each.documents for each in writers.values())}; "
                    "cut smaller ones (--document-kib) or change the share (--validation)"
                )
        # In the block: when one folder cannot be completed the exception removes the other one too.
        return {split: writer.close() for split, writer in writers.items()}


def _tokens(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.concatenate(([tokenizer.bos_id], tokenizer.encode(text), [tokenizer.eos_id]))


def _share(text: str) -> float:
    """A number from 0 to below 1 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def build_mqar(
    spec: MQARSpec,
    counts: Sequence[int],
    output: Path,
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Manifest:
    """Write recall samples with their labels into shards.

    Args:
        spec: the samples; the weights of its settings do not matter here.
        counts: samples of each setting, in order.
        output: folder of the shards.
        seed: of the samples.
        shard_bytes: size at which a shard is closed.
        overwrite: replace a folder that is complete.

    Raises:
        InputError: a count below 1, or the output is complete already.
        OSError: the output cannot be written; it is not complete then.
    """
    if len(counts) != len(spec.settings) or min(counts) < 1:
        raise InputError(
            f"counts of samples {list(counts)}: expected one of at least 1 for each of {len(spec.settings)} settings"
        )
    about = {"spec": asdict(spec), "counts": list(counts), "seed": seed}
    with ShardWriter(
        output,
        vocab_size=spec.vocab_size,
        kind="mqar",
        form=spec.form,
        shard_bytes=shard_bytes,
        about=about,
        overwrite=overwrite,
    ) as writer:
        for setting, count in zip(spec.settings, counts, strict=True):
            for first in range(0, count, _CHUNK):
                _write_samples(writer, spec, setting, np.arange(first, min(first + _CHUNK, count)), seed)
        return writer.close()


def _write_samples(writer: ShardWriter, spec: MQARSpec, setting: MQARSetting, numbers: np.ndarray, seed: int) -> None:
    samples = generate_mqar(spec, setting, numbers, seed=seed, stream="build")
    for row, number in enumerate(numbers):
        writer.add(
            samples.tokens[row],
            labels=samples.labels[row],
            encoder=None if samples.encoder is None else samples.encoder[row],
            meta={"source": f"{setting.length}:{setting.pairs}", "sample": int(number)},
        )
