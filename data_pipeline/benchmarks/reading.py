"""How fast shards are read, beside plain webdataset, litdata and mosaicml-streaming on the same text.

    PYTHONPATH=data_pipeline python data_pipeline/benchmarks/reading.py [--folder DIR] [--tokens N] [PART ...]

Parts: `throughput`, million tokens a second that one process gets from the page cache as rows of 2048 tokens, best of
three passes over the corpus, each library in a process of its own; `memory`, of a reader over a million rows;
`startup`, seconds to open a plan on 10,000 shards and read its first row. The corpus is the embedded novels in
documents of about 4 KiB, tokenised with 8192 tokens, shuffled and repeated. Libraries that are not installed are said
to be. `CPU` is the rate by the processor time of the process that gets the rows: on a busy machine the better guide.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slotmamba_data import (
    PlanReader,
    ShardFolder,
    ShardWriter,
    Source,
    Tokenizer,
    open_plan,
    open_text,
    train_tokenizer,
)
from slotmamba_data.prefetch import PrefetchReader
from slotmamba_data.text import EMBEDDED

SEQ_LEN = 2048
SHARD_BYTES = 16 * 1024 * 1024
PASSES = 3
MANY_SHARDS = 10_000
MANY_ROWS, SHORT_ROW = 1_000_000, 256

Rows = Iterator[Any]


def documents(folder: Path, tokens: int) -> Iterator[np.ndarray]:
    """uint16 arrays, `tokens` tokens and a bit in all, the same at each call."""
    if not (folder / "tokenizer").exists():
        train_tokenizer(["austen:train"], folder / "tokenizer", vocab_size=8192)
    tokenizer = Tokenizer(folder / "tokenizer")
    texts = [text for name in EMBEDDED for text in open_text(name, document_bytes=4096)]
    encoded = [tokenizer.encode(text).astype(np.uint16) for text in texts]
    rng = np.random.default_rng(0)
    count = 0
    while count < tokens:
        for number in rng.permutation(len(encoded)):
            count += len(encoded[number])
            yield encoded[number]


def packed(some: Iterable[np.ndarray]) -> Rows:
    """Rows of documents that are joined and cut, the least that a loader of documents needs for training."""
    waiting: list[np.ndarray] = []
    size = 0
    for document in some:
        waiting.append(document)
        size += len(document)
        if size >= SEQ_LEN:
            joined = np.concatenate(waiting)
            for start in range(0, size - SEQ_LEN + 1, SEQ_LEN):
                yield joined[start : start + SEQ_LEN].astype(np.int32)
            waiting = [joined[size - size % SEQ_LEN :]]
            size %= SEQ_LEN


def write_slotmamba(folder: Path, some: Iterable[np.ndarray]) -> None:
    with ShardWriter(folder, vocab_size=8192, shard_bytes=SHARD_BYTES) as writer:
        for document in some:
            writer.add(document)


def plan_rows(folder: Path) -> Rows:
    """Shuffled rows with labels, document starts and masks, as training takes them."""
    plan = open_plan([Source("text", shards=folder)], SEQ_LEN, seed=0)
    rows = plan.describe()[0].contents.rows_per_epoch
    assert rows is not None
    return (plan[number] for number in range(rows))


def prefetched_rows(folder: Path, workers: int) -> Rows:
    """The same through worker processes, in batches of 64."""
    plan = open_plan([Source("text", shards=folder)], SEQ_LEN, seed=0)
    rows = plan.describe()[0].contents.rows_per_epoch
    assert rows is not None
    reader = PrefetchReader(plan, 0, workers)
    reader.next_batch(64)
    for _ in range(rows // 64 - 1):
        yield from reader.next_batch(64)
    reader.close()


def span_rows(folder: Path) -> Rows:
    """Rows in the order of the shards, nothing but tokens: what the reader itself can do."""
    shards = ShardFolder(folder)
    for number, entry in enumerate(shards.manifest.shards):
        for start in range(0, entry.tokens - SEQ_LEN, SEQ_LEN):
            yield shards.read_span(number, start, start + SEQ_LEN).astype(np.int32)


def sample_rows(folder: Path) -> Rows:
    """Our shards through the webdataset library."""
    import webdataset

    names = [str(path) for path in sorted(folder.glob("*.tar"))]
    return packed(sample["tokens.npy"] for sample in webdataset.WebDataset(names, shardshuffle=False).decode())


def write_webdataset(folder: Path, some: Iterable[np.ndarray]) -> None:
    import webdataset

    with webdataset.ShardWriter(str(folder / "shard-%06d.tar"), maxsize=SHARD_BYTES, verbose=0) as writer:
        for number, document in enumerate(some):
            writer.write({"__key__": f"{number:09d}", "tokens.npy": document})


def write_litdata(folder: Path, some: Iterable[np.ndarray]) -> None:
    import torch
    from litdata.streaming import Cache, TokensLoader

    cache = Cache(str(folder), chunk_bytes=SHARD_BYTES, item_loader=TokensLoader())
    for number, document in enumerate(some):
        cache[number] = torch.from_numpy(document.astype(np.int32))
    cache.done()
    cache.merge()


def litdata_rows(folder: Path) -> Rows:
    from litdata import StreamingDataset, TokensLoader

    blocks = StreamingDataset(str(folder), item_loader=TokensLoader(block_size=SEQ_LEN), shuffle=True)
    return (block.clone() for block in blocks)  # which are views of a mapped file that nobody has read yet


def write_streaming(folder: Path, some: Iterable[np.ndarray]) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"tokens": "ndarray:uint16"}, size_limit=SHARD_BYTES) as writer:
        for document in some:
            writer.write({"tokens": document})


def streaming_rows(folder: Path) -> Rows:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=1)
    return packed(sample["tokens"] for sample in dataset)


Write = Callable[[Path, Iterable[np.ndarray]], None]
LIBRARIES: dict[str, tuple[str, Write, Callable[[Path], Rows]]] = {
    "slotmamba plan": ("slotmamba", write_slotmamba, plan_rows),
    "slotmamba plan, 1 worker": ("slotmamba", write_slotmamba, lambda folder: prefetched_rows(folder, 1)),
    "slotmamba plan, 2 workers": ("slotmamba", write_slotmamba, lambda folder: prefetched_rows(folder, 2)),
    "slotmamba spans": ("slotmamba", write_slotmamba, span_rows),
    "webdataset, these shards": ("slotmamba", write_slotmamba, sample_rows),
    "webdataset, a sample a document": ("webdataset", write_webdataset, sample_rows),
    "litdata, blocks of tokens": ("litdata", write_litdata, litdata_rows),
    "mosaicml-streaming": ("streaming", write_streaming, streaming_rows),
}


def measure_throughput(name: str, folder: Path, tokens: int) -> dict[str, Any]:
    """Million tokens a second of one library."""
    kind, write, read = LIBRARIES[name]
    try:
        if not (folder / kind).exists():
            (folder / kind).mkdir()
            write(folder / kind, documents(folder, tokens))
        rates, by_cpu = [], []
        for _ in range(PASSES):
            rows = read(folder / kind)
            next(rows)  # whatever is set up at the first
            began, cpu = time.perf_counter(), sum(os.times()[:2])
            tokens = sum(1 for _ in rows) * SEQ_LEN
            rates.append(tokens / (time.perf_counter() - began) / 1e6)
            by_cpu.append(tokens / (sum(os.times()[:2]) - cpu) / 1e6)
    except ModuleNotFoundError as error:
        (folder / kind).rmdir()
        return {"missing": error.name}
    return {"rate": max(rates), "cpu": max(by_cpu)}


def measure_memory(folder: Path) -> dict[str, Any]:
    """MiB of private memory after each tenth of a million rows, and million tokens a second."""
    reader = PlanReader(open_plan([Source("text", shards=folder / "slotmamba")], SHORT_ROW, seed=0))
    used = []
    began = time.perf_counter()
    for number in range(MANY_ROWS // 100):
        reader.next_batch(100)
        if (number + 1) % (MANY_ROWS // 1000) == 0:
            used.append(private_mib())
    return {"mib": used, "rate": MANY_ROWS * SHORT_ROW / (time.perf_counter() - began) / 1e6}


def private_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def write_many(folder: Path) -> None:
    """A folder of many small shards."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder, vocab_size=8192, shard_bytes=1) as writer:
        for _ in range(MANY_SHARDS):
            writer.add(rng.integers(0, 8192, 3000))


def measure_startup(folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    plan = open_plan([Source("text", shards=folder / "many")], SEQ_LEN, seed=0)
    opened = time.perf_counter()
    _ = plan[0]
    return {"open": opened - began, "row": time.perf_counter() - opened, "mib": private_mib()}


def in_own_process(*words: object) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def report(parts: list[str], folder: Path, tokens: int) -> None:
    if "throughput" in parts:
        print(f"{'rows of 2048 tokens':<34} million tokens/s   CPU")
        for name in LIBRARIES:
            found = in_own_process("throughput", name, folder, tokens)
            rates = f"{found['rate']:16.1f} {found['cpu']:5.1f}" if "rate" in found else None
            print(f"{name:<34} {rates or found['missing'] + ' not installed'}", flush=True)
    if "memory" in parts:
        if not (folder / "slotmamba").exists():
            write_slotmamba(folder / "slotmamba", documents(folder, tokens))
        found = in_own_process("memory", folder)
        print(f"{MANY_ROWS:,} rows of {SHORT_ROW} tokens, {found['rate']:.1f} million tokens/s; MiB after each tenth:")
        print("  " + " ".join(f"{each:.0f}" for each in found["mib"]))
    if "startup" in parts:
        if not (folder / "many").exists():
            write_many(folder / "many")
        found = in_own_process("startup", folder)
        print(
            f"{MANY_SHARDS:,} shards: opened in {found['open']:.2f} s, first row {found['row']:.2f} s later, "
            f"{found['mib']:.0f} MiB"
        )


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        part, *words = sys.argv[2:]
        if part == "throughput":
            result = measure_throughput(words[0], Path(words[1]), int(words[2]))
        else:
            result = {"memory": measure_memory, "startup": measure_startup}[part](Path(words[0]))
        print(json.dumps(result))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("throughput", "memory", "startup")
    parser.add_argument("parts", nargs="*", metavar="PART", choices=[*parts, []], help=", ".join(parts))
    parser.add_argument("--folder", type=Path, help="where the corpora are made, and kept for the next time")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="size of the corpus (default: 40 million)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report(list(args.parts or parts), folder.resolve(), args.tokens)


if __name__ == "__main__":
    main()
