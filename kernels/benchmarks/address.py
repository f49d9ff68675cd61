"""Kronecker addressing and the decoding step on a GPU, each fused and in PyTorch.

    PYTHONPATH=kernels python kernels/benchmarks/address.py

Addressing at the reference shape (B=8, T=4096, H=8), float32 logits: milliseconds of the forward pass and of forward
and backward, and the GB/s that they make of the bytes they have to move. Decoding one token of every row (H=8, d=128,
n=2, K=8, bfloat16): microseconds of a step, called from Python and replayed as a CUDA graph, GB/s of the replay,
microseconds a token, and the step of `hksa` with T = 1, which copies the state. Medians; tokens take turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmamba_kernels import SlotState, hksa, hksa_step_, kronecker_topk

DEVICE = "cuda"
ROWS = 8 * 4096 * 8
FACTORS = ((5, 4), (3, 10), (10, 4))
ACTIVE = (4, 8, 16)
BATCHES = (1, 8, 64, 256)
MEMORIES = ((5, 4), (8, 4))  # (U, p)
HEADS, DIM, STEPS, TOP_K = 8, 128, 2, 8
REPEATS = 20
TOKENS = 10
COPIES = 6  # of the state, about, while hksa's torch backend runs a step

Call = Callable[[], object]


def median_us(*calls: Call) -> float:
    """Of one of the calls, which run in turn, queued one behind the other, warm."""

    def all_calls() -> None:
        for call in calls:
            call()

    for _ in range(3):
        all_calls()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    events[0].record()
    for event in events[1:]:
        all_calls()
        event.record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in pairwise(events)]
    return statistics.median(times) * 1000 / len(calls)


def graphed(*calls: Call) -> Call:
    """Replays the calls, once each, as a CUDA graph; they have run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def forward(backend: str, logits: Tensor, k: int) -> Tensor:
    return kronecker_topk(logits.detach(), k, backend)[1]


def both_ways(backend: str, logits: Tensor, k: int, upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(kronecker_topk(logits, k, backend)[1], logits, upstream)


def addressing() -> None:
    print(f"kronecker_topk, {ROWS} rows, float32: ms (GB/s)")
    print(f"{'U':>3} {'p':>3} {'K':>3} {'forward':>16} {'torch':>8} {'both ways':>16} {'torch':>8}")
    for factors, size in FACTORS:
        logits = (2 * torch.randn(ROWS, factors, size, device=DEVICE)).requires_grad_()
        for k in ACTIVE:
            upstream = torch.randn(ROWS, k, device=DEVICE)
            entries, kept = 4 * logits.numel(), 4 * ROWS * k
            there = partial(forward, logits=logits, k=k)
            and_back = partial(both_ways, logits=logits, k=k, upstream=upstream)
            cells = []
            for run, moved in ((there, entries + 2 * kept), (and_back, 3 * entries + 5 * kept)):
                us = median_us(partial(run, "triton"))
                cells.append(f"{us / 1000:8.3f} ({moved / us / 1000:5.0f})")
                cells.append(f"{median_us(partial(run, 'torch')) / 1000:8.2f}")
            print(f"{factors:3} {size:3} {k:3} {' '.join(cells)}", flush=True)


@torch.no_grad()
def decoding() -> None:
    print(f"\nhksa_step_, H={HEADS} d={DIM} n={STEPS} K={TOP_K}, bfloat16: us")
    print(f"{'M':>6} {'B':>4} {'step':>8} {'graph':>8} {'GB/s':>6} {'a token':>8} {'hksa, T=1':>10}")
    for factors, size in MEMORIES:
        for batch in BATCHES:
            slots = size**factors
            state_bytes = 4 * batch * HEADS * slots * (2 * DIM + 2)
            free, _ = torch.cuda.mem_get_info()
            if state_bytes > 0.9 * free:
                print(f"{slots:6} {batch:4} a state of {state_bytes / 2**30:.0f} GiB does not fit")
                continue
            fused, plain = steps(batch, factors, size)
            us, graph = median_us(*fused), median_us(graphed(*fused)) / TOKENS
            # Write and read K slots each, the written ones also before the write; inputs are small beside that.
            moved = 4 * batch * HEADS * 3 * TOP_K * (2 * DIM + 2)
            other = f"{median_us(*plain):10.1f}" if (1 + COPIES) * state_bytes < 0.9 * free else f"{'no room':>10}"
            print(
                f"{slots:6} {batch:4} {us:8.1f} {graph:8.1f} {moved / graph / 1000:6.0f} {graph / batch:8.2f} {other}",
                flush=True,
            )
            del fused, plain
            torch.cuda.empty_cache()


def steps(batch: int, factors: int, size: int) -> tuple[list[Call], list[Call]]:
    """A few tokens in place, and by kronecker_topk and hksa. They differ in their addresses."""
    slots = size**factors

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, HEADS, *shape, device=DEVICE).to(torch.bfloat16)

    vectors: dict[str, Any] = {
        "q": normal(DIM),
        "k": F.normalize(normal(STEPS, DIM), dim=-1),
        "u_k": normal(STEPS, DIM),
        "u_v": normal(STEPS, DIM),
        "beta": normal(STEPS).sigmoid(),
    }
    gamma, a_s, eta = (torch.rand(HEADS, device=DEVICE) for _ in range(3))
    state = SlotState.initial(batch, HEADS, slots, DIM, device=DEVICE)
    shared: dict[str, Any] = {"gamma": gamma, "state": state, "surprise": (a_s, eta)}

    def fused(write_logits: Tensor, read_logits: Tensor) -> Tensor:
        logits: dict[str, Any] = {"write_logits": write_logits, "read_logits": read_logits}
        return hksa_step_(**vectors, **logits, **shared, top_k=TOP_K, backend="triton")

    def plain(write_logits: Tensor, read_logits: Tensor) -> Tensor:
        token = dict(vectors)
        token["write_idx"], token["write_w"] = kronecker_topk(write_logits, TOP_K)
        token["read_idx"], token["read_w"] = kronecker_topk(read_logits, TOP_K)
        token = {name: x.unsqueeze(1) for name, x in token.items()}
        return hksa(**token, **shared, num_slots=slots, backend="torch")[0]

    logits = [2 * torch.randn(2, batch, HEADS, factors, size, device=DEVICE) for _ in range(TOKENS)]
    return [partial(fused, *token) for token in logits], [partial(plain, *token) for token in logits]


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    torch.manual_seed(0)
    addressing()
    decoding()


if __name__ == "__main__":
    main()
