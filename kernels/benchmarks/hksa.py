"""HKSA on a GPU beside the layers that it competes with: forward and backward, one run, one table.

    PYTHONPATH=kernels python kernels/benchmarks/hksa.py [--quick | --skew | --long | --memory] [--peers-only] [--mamba]
                                                         [--json PATH]

Without options: the reference shape (B = 8, T = 4096, D = 1024 in 8 heads, n = 2, K = 8, M = 1024, uniform addresses),
what one factor at a time changes, then all layers from T = 2k to 256k at 32k tokens, or one row of T tokens where that
is more. A layer that cannot run is a row that says why. `GB` and `of copy` are what HKSA has to move by the traffic
model below and how its rate compares with a copy on the same card; `x base` is the time per token beside HKSA's at the
reference shape; `first s` is the time of the first call, compiling and tuning included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peers import DIM, HEADS, PEERS
from slotmamba_kernels import hksa
from timing import (
    DEVICE,
    Report,
    Workload,
    copy_bandwidth,
    describe_machine,
    measure,
    median_ms,
    peak_bytes,
    require_gpu,
)
from tuning import tune_quickly

TOKENS = 32768
LENGTHS = tuple(2**e for e in range(11, 19))
LONG = 1_000_000
GIB = 2**30
# Peers that have not begun by then are not run, so that a benchmark ends when it should.
QUICK_SECONDS, FULL_SECONDS = 80.0, 420.0


@dataclass(frozen=True)
class Case:
    """A shape of HKSA: n steps, K active slots a token for writing and as many for reading, M slots a head."""

    batch: int = 8
    length: int = 4096
    steps: int = 2
    active: int = 8
    slots: int = 1024
    zipf: bool = False
    recompute: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.length


BASE = Case()
VARIANTS = {
    "HKSA": BASE,
    "HKSA, recompute": replace(BASE, recompute=True),
    "HKSA, n=1": replace(BASE, steps=1),
    "HKSA, K=4": replace(BASE, active=4),
    "HKSA, M=64k": replace(BASE, slots=2**16),
    "HKSA, M=1M": replace(BASE, slots=2**20),
    "HKSA, Zipf(1.0)": replace(BASE, zipf=True),
}


def at_length(length: int) -> Case:
    """The reference shape with other rows: as many as make 32k tokens, at least one."""
    return replace(BASE, batch=max(1, TOKENS // length), length=length)


def workload(case: Case) -> Workload:
    rows = (case.batch, case.length, HEADS)
    steps = (*rows, case.steps)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

    def weights() -> Tensor:
        return torch.rand(*rows, case.active, device=DEVICE) * 0.9 + 0.05

    k = F.normalize(normal(*steps, DIM), dim=-1)
    tensors = [normal(*rows, DIM), k, normal(*steps, DIM), normal(*steps, DIM), 2 * normal(*steps).sigmoid()]
    tensors += [weights(), weights(), torch.rand(HEADS, device=DEVICE) + 0.5]
    q, k, u_k, u_v, beta, write_w, read_w, gamma = inputs = [x.requires_grad_() for x in tensors]
    draw = zipf_slots if case.zipf else uniform_slots
    write_idx, read_idx = (draw(q[..., 0].numel(), case.active, case.slots).view(*rows, -1) for _ in range(2))

    def forward() -> Tensor:
        o, _ = hksa(
            q, k, u_k, u_v, beta, write_idx, write_w, read_idx, read_w, gamma,
            num_slots=case.slots, recompute=case.recompute, backend="triton",
        )  # fmt: skip
        return o

    return Workload(forward, inputs)


def uniform_slots(rows: int, count: int, slots: int) -> Tensor:
    """[rows, count] int32: the j-th from the j-th part of the memory, so distinct, and all slots equally likely."""
    part = slots // count
    return (torch.randint(part, (rows, count), device=DEVICE) + part * torch.arange(count, device=DEVICE)).int()


def zipf_slots(rows: int, count: int, slots: int) -> Tensor:
    """[rows, count] int32, distinct in a row: drawn one after the other with probabilities 1/rank, ranks in any order.

    The largest of log-probabilities plus Gumbel noise are such a draw.
    """
    logits = -torch.arange(1, slots + 1, device=DEVICE, dtype=torch.float32).log()
    slot = torch.randperm(slots, device=DEVICE).int()
    drawn = [
        (logits - torch.empty(min(2**14, rows - row), slots, device=DEVICE).exponential_().log()).topk(count).indices
        for row in range(0, rows, 2**14)
    ]
    return slot[torch.cat(drawn)]


def traffic(case: Case, itemsize: int = 2) -> int:
    """Bytes that forward and backward have to move, each kernel reading its inputs once, of `itemsize` bytes a number.

    By token and head: the table of states after each write (K times a key and a value vector, and z in float32) is
    written by the chains and read by the read's forward and backward pass and by the tokens' backward pass; the table
    of adjoints is written and read once. With recomputation the chains run twice. Of vectors of d numbers the chains
    read 3n (k, u_k, u_v), the read 2 (q, o) and its backward pass 3 (q, the gradients of o and q), the chains' backward
    pass n + 2 (k, q, the gradient of o), the tokens' backward pass 6n (k, u_k, u_v and their gradients). Indices and
    weights are 4 bytes each, read in both directions; the weights have a gradient. The state that leaves and what the
    plan sorts are left out.
    """
    state = case.active * (2 * DIM * itemsize + 4)
    passes = 7 if case.recompute else 6
    chains = 2 if case.recompute else 1
    vectors = 3 * case.steps * chains + 2 + 3 + (case.steps + 2) + 6 * case.steps
    addresses = 2 * case.active * 4 * (2 * 2 + 1)
    return case.tokens * HEADS * (passes * state + vectors * DIM * itemsize + addresses)


class Benchmark:
    """Measures layers, one row each, and remembers whether one of ours failed."""

    def __init__(self) -> None:
        widths = {"layer": 34, "B": 3, "T": 7, "ms": 8, "Mtok/s": 7, "GB": 6, "of copy": 8, "x base": 7, "first s": 8}
        self.report = Report({**widths, "note": 0})
        self.bandwidth = copy_bandwidth()
        self.base: float | None = None  # ms a token of HKSA at the reference shape
        self.failed = False
        self.started = time.monotonic()

    def ours(self, name: str, case: Case) -> float | None:
        """Milliseconds of forward and backward; None where they do not run."""
        moved = traffic(case)
        cells = measure(lambda: workload(case))
        ms = cells.get("ms")
        if ms is not None:
            cells |= {"GB": moved / 1e9, "of copy": moved / ms * 1000 / self.bandwidth}
        if self.base is None and case == BASE and ms is not None:
            self.base = ms / case.tokens
        self.failed |= ms is None
        self.row(name, case.batch, case.length, cells)
        return ms

    def peers(self, lengths: Sequence[int], mamba: bool, seconds: float) -> None:
        """Each peer at all lengths, until one fails."""
        for peer in PEERS:
            if peer.slow_start and not mamba:
                continue
            if time.monotonic() - self.started > seconds:
                self.report.add({"layer": peer.name, "note": f"not run: {seconds:.0f} s are over"})
                continue
            for length in lengths:
                batch = max(1, TOKENS // length)
                cells = measure(partial(peer.make, batch, length))
                cells.setdefault("note", peer.note)
                self.row(peer.name, batch, length, cells)
                if "ms" not in cells:
                    break

    def row(self, name: str, batch: int, length: int, cells: dict[str, Any]) -> None:
        row = {"layer": name, "B": batch, "T": length, **cells}
        if "ms" in cells:
            per_token = cells["ms"] / (batch * length)
            row["Mtok/s"] = 1 / per_token / 1000
            row["x base"] = None if self.base is None else per_token / self.base
        self.report.add(row)
        torch.cuda.empty_cache()


def memory_table(report: Report) -> None:
    """Peak memory of forward and backward beyond the inputs, the output's gradient and the inputs' gradients."""
    report.header("peak memory beyond inputs and gradients (the output is counted)")
    for case in (BASE, *(replace(BASE, batch=1, length=length) for length in LENGTHS)):
        for recompute in (False, True):
            work = workload(replace(case, recompute=recompute))
            extra = peak_bytes(work.both_ways()) - work.gradient_bytes()
            cells = {"B": case.batch, "T": case.length, "recompute": "on" if recompute else "off"}
            report.add({"layer": "HKSA", **cells, "GiB": extra / GIB, "bytes/token": extra / case.tokens})
            del work
            torch.cuda.empty_cache()


def long_sequence(report: Report) -> None:
    """A million tokens, forward and backward, and all the memory that takes."""
    report.header("one layer at D = 1024")
    work = workload(replace(BASE, batch=1, length=LONG, recompute=True))
    run = work.both_ways()
    run()
    ms = median_ms(run, least=3, most=5)
    cells = {"B": 1, "T": LONG, "ms": ms, "Mtok/s": LONG / ms / 1000}
    report.add({"layer": "HKSA, recompute", **cells, "peak GiB": torch.cuda.max_memory_allocated() / GIB})


def skew(benchmark: Benchmark) -> None:
    """What hot slots cost where few chains run: one row."""
    case = replace(BASE, batch=1, slots=256)
    benchmark.report.header("skewed addresses, M=256")
    uniform = benchmark.ours("HKSA, uniform", case)
    zipf = benchmark.ours("HKSA, Zipf(1.0)", replace(case, zipf=True))
    if uniform is not None and zipf is not None:
        print(f"Zipf(1.0) takes {zipf / uniform:.2f} times uniform")


def compare(benchmark: Benchmark, options: argparse.Namespace) -> None:
    """The table of all layers."""
    names = ["HKSA", "HKSA, recompute"] if options.quick else list(VARIANTS)
    if not options.peers_only:
        benchmark.report.header("HKSA, forward and backward")
        for name in names:
            benchmark.ours(name, VARIANTS[name])
        for length in LENGTHS if not options.quick else ():
            benchmark.ours("HKSA", at_length(length))
        if not options.quick:
            benchmark.ours("HKSA, recompute", replace(at_length(LENGTHS[-1]), recompute=True))
    benchmark.report.header("peers, forward and backward")
    lengths = (BASE.length,) if options.quick else LENGTHS
    benchmark.peers(lengths, options.mamba, QUICK_SECONDS if options.quick else FULL_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description="HKSA on a GPU beside the layers that it competes with.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="the reference shape only")
    what.add_argument("--skew", action="store_true", help="uniform against Zipf addresses at B=1, T=4096, M=256")
    what.add_argument("--long", action="store_true", help="a sequence of a million tokens and its peak memory")
    what.add_argument("--memory", action="store_true", help="peak memory with and without recomputation, against T")
    parser.add_argument("--peers-only", action="store_true", help="leave HKSA out")
    parser.add_argument("--mamba", action="store_true", help="Mamba-2 too, whose first call tunes for long")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    tune_quickly()
    print("  ".join(f"{name} {value}" for name, value in describe_machine().items()))

    if options.memory or options.long:
        columns = (
            ["B", "T", "recompute", "GiB", "bytes/token"] if options.memory else ["B", "T", "ms", "Mtok/s", "peak GiB"]
        )
        report = Report({"layer": 18, **dict.fromkeys(columns, 11)})
        (memory_table if options.memory else long_sequence)(report)
        bandwidth = None
    else:
        benchmark = Benchmark()
        report, bandwidth = benchmark.report, benchmark.bandwidth
        print(f"copy: {bandwidth / 1e12:.2f} TB/s, read and written")
        skew(benchmark) if options.skew else compare(benchmark, options)
    if options.json:
        report.write_json(options.json, copy_bytes_per_second=bandwidth)
    if bandwidth is not None and benchmark.failed:
        raise SystemExit("a row of HKSA failed")


if __name__ == "__main__":
    main()
