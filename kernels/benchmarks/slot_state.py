"""What memories between segments cost on a GPU: threading them through layers, and leaving them at all.

    PYTHONPATH=kernels python kernels/benchmarks/slot_state.py [--json PATH]

`ms` is forward and backward; `of copy` how the rows that threading reads and writes in it compare with a copy (of a
dense memory 8 times its rows: forward two memories read and one written, backward three read and two written); `MiB`
the most memory held beyond the inputs, and beyond the gradients in HKSA's rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import hksa as benchmark_hksa
from slotmamba_kernels import SlotState, hksa, thread_slots
from slotmamba_kernels.hksa.state import SparseSlotState
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

HEADS, DIM = 8, 128
DENSE = (8, 1024)  # B, M
SPARSE = (1, 4**10)
ROWS = 32768  # of each of two sparse memories, half of them slots of both


def tensors(state: SlotState) -> list[Tensor]:
    return [state.S_k, state.S_v, state.z, state.surprise]


def random_state(batch: int, rows: int) -> SlotState:
    scores = (batch, HEADS, rows)
    parts = [torch.randn(*scores, DIM, device=DEVICE), torch.randn(*scores, DIM, device=DEVICE)]
    parts += [torch.rand(scores, device=DEVICE) + 0.1, torch.rand(scores, device=DEVICE)]
    return SlotState(*(x.requires_grad_() for x in parts))


def sparse_state(first: int) -> SparseSlotState:
    """Every fourth slot from `first` on, ROWS of them."""
    batch, num_slots = SPARSE
    slots = first + 4 * torch.arange(ROWS, device=DEVICE, dtype=torch.int32)
    held = random_state(batch, ROWS)
    return SparseSlotState(
        held.S_k, held.S_v, held.z, held.surprise,
        slots=slots.expand(batch, HEADS, ROWS).contiguous(), slots_in_all=num_slots,
    )  # fmt: skip


def threading(own: SlotState, below: SlotState, backend: str) -> tuple[Callable[[], SlotState], Callable[[], object]]:
    """The forward pass, and both passes."""
    bias, slope = (torch.randn(HEADS, device=DEVICE, requires_grad=True) for _ in range(2))
    inputs = [*tensors(own), *tensors(below), bias, slope]

    def forward() -> SlotState:
        return thread_slots(own, below, bias, slope, backend=backend)

    grads = [torch.randn_like(x) for x in tensors(forward())]
    return forward, lambda: torch.autograd.grad(tensors(forward()), inputs, grads)


def memory_leaving(slots: int, return_state: bool) -> Workload:
    """32,768 tokens, B=1, at the reference shape otherwise."""
    case = replace(benchmark_hksa.at_length(32768), slots=slots)
    work = benchmark_hksa.workload(case)
    q, k, u_k, u_v, beta, write_w, read_w, gamma = work.inputs
    write_idx, read_idx = (
        benchmark_hksa.uniform_slots(q[..., 0].numel(), case.active, slots).view(*q.shape[:-1], -1) for _ in range(2)
    )

    def forward() -> Tensor:
        o, _ = hksa(
            q, k, u_k, u_v, beta, write_idx, write_w, read_idx, read_w, gamma,
            num_slots=slots, return_state=return_state, backend="triton",
        )  # fmt: skip
        return o

    return Workload(forward, work.inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Slot memories between segments on a GPU.")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print("  ".join(f"{name} {value}" for name, value in describe_machine().items()))
    print(f"copy: {bandwidth / 1e12:.2f} TB/s, read and written")
    report = Report({"what": 34, "forward ms": 10, "ms": 8, "of copy": 8, "MiB": 8, "first s": 8, "note": 0})

    report.header(f"threading, H={HEADS}, d={DIM}")
    pairs = {
        "dense, B=8, M=1024": (random_state(*DENSE), random_state(*DENSE), ("torch", "triton"), 8 * 8 * HEADS * 1024),
        "sparse, B=1, M=4^10, 32k rows": (sparse_state(0), sparse_state(2 * ROWS), ("triton",), 9 * HEADS * ROWS),
    }
    for name, (own, below, backends, moved_rows) in pairs.items():
        for backend in backends:
            forward, both = threading(own, below, backend)
            ms = median_ms(both)
            moved = moved_rows * (2 * DIM + 2) * 4
            report.add(
                {
                    "what": f"{name}, {backend}", "forward ms": median_ms(forward), "ms": ms,
                    "of copy": moved / ms * 1000 / bandwidth, "MiB": peak_bytes(both) / 2**20,
                }
            )  # fmt: skip
        torch.cuda.empty_cache()

    report.header("HKSA on 32k tokens, with and without the leaving memory")
    for slots in (1024, 2**20):
        for return_state in (True, False):
            cells = measure(partial(memory_leaving, slots, return_state), memory=True)
            report.add({"what": f"M={slots}, {'leaves one' if return_state else 'leaves none'}", **cells})
            torch.cuda.empty_cache()
    if options.json:
        report.write_json(options.json, copy_bytes_per_second=bandwidth)


if __name__ == "__main__":
    main()
