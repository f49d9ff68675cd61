"""How long BD-LRU takes on a GPU: its Triton kernels beside the `torch` backend, and both beside a copy.

    PYTHONPATH=kernels python kernels/benchmarks/bdlru.py [--sweep]

v is bfloat16, gates are float32, D=1024. Medians in milliseconds, forward and forward + backward. "of copy" is the rate
at which the least possible bytes went by (each input read and each output written once; forward, then backward), over
that of a copy in the same run; kernels that cut the sequence into chunks read gates twice. --sweep times the kernels
for other chunks and other distances of loading ahead instead: where the tables of triton_op.py come from.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.testing import do_bench

from slotmamba_kernels.bdlru import bdlru, triton_op

WIDTH = 1024
SHAPES = [(8, 4096), (8, 2048), (1, 32768)]
BLOCK_SIZES = [2, 4, 8, 16]
CHUNKS = [2048, 1024, 512, 256, 128]
DISTANCES = [2, 4, 8, 16]
MOST_AHEAD = 64  # matrix entries that a lane holds ahead; more do not fit its registers


@dataclass(frozen=True)
class Case:
    batch: int
    length: int
    m: int

    def inputs(self) -> list[Tensor]:
        tokens = (self.batch, self.length)
        v = torch.randn(*tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
        gates = torch.randn(*tokens, WIDTH // self.m, self.m, self.m + 1, device="cuda").softmax(-1)
        state = torch.randn(self.batch, WIDTH, device="cuda")
        return [v.requires_grad_(), gates.requires_grad_(), state.requires_grad_()]

    def least_bytes(self) -> tuple[int, int]:
        """Forward; forward + backward."""
        rows, gates = self.batch * self.length * WIDTH, 4 * (self.m + 1)
        forward = gates + 2 + 2
        return rows * forward, rows * (forward + 2 * gates + 4 * 2)


def milliseconds(run: Callable[[], object]) -> float:
    return do_bench(run, warmup=50, rep=200, return_mode="median")


def both_ways(inputs: list[Tensor], backend: str) -> Callable[[], object]:
    v, gates, state = inputs
    grad = torch.randn_like(v)
    return lambda: torch.autograd.grad(bdlru(v, gates, state, backend=backend)[0], inputs, grad)


def one_way(inputs: list[Tensor], backend: str) -> Callable[[], object]:
    v, gates, state = (x.detach() for x in inputs)
    return lambda: bdlru(v, gates, state, backend=backend)


def forward_alone(inputs: list[Tensor]) -> Callable[[], object]:
    return one_way(inputs, "triton")


def backward_alone(inputs: list[Tensor]) -> Callable[[], object]:
    v, gates, state = (x.detach() for x in inputs)
    h, leaving = bdlru(v, gates, state, backend="triton")
    return lambda: triton_op.bdlru_backward(h, leaving, v, gates, state, None, h)


def copy_rate() -> float:
    """Bytes per millisecond."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source))


def compare() -> None:
    rate = copy_rate()
    print(f"a copy moves {rate / 1e6:,.0f} GB/s")
    print_row("shape", "m", "chunk", "forward", "of copy", "both", "of copy", "torch fwd", "torch both")
    for batch, length in SHAPES:
        for m in BLOCK_SIZES:
            case = Case(batch, length, m)
            inputs = case.inputs()
            forward, both = milliseconds(one_way(inputs, "triton")), milliseconds(both_ways(inputs, "triton"))
            least, least_both = (size / rate for size in case.least_bytes())
            peers = [milliseconds(make(inputs, "torch")) for make in (one_way, both_ways)]
            print_row(
                f"B={batch} T={length}", m, triton_op.chunk_length(batch, length, WIDTH, m),
                f"{forward:.3f}", f"{least / forward:.0%}", f"{both:.3f}", f"{least_both / both:.0%}",
                *(f"{peer:.2f}" for peer in peers),
            )  # fmt: skip


def print_row(*cells: object) -> None:
    widths = (14, 4, 7, 9, 9, 9, 9, 11, 12)
    print("".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)), flush=True)


def sweep() -> None:
    """Every length of chunks with every distance of loading ahead; forward and backward, a table each."""
    chunk_length, tables = triton_op.chunk_length, (triton_op.AHEAD, triton_op.AHEAD_BACKWARD)
    for batch, length in SHAPES:
        for m in (1, *BLOCK_SIZES):
            inputs = Case(batch, length, m).inputs()
            distances = [distance for distance in DISTANCES if distance * m <= MOST_AHEAD]
            for way, table, make in zip(("forward", "backward"), tables, (forward_alone, backward_alone), strict=True):
                said = f"{chunk_length(batch, length, WIDTH, m)} ahead {table[m]}"
                print(f"\nB={batch} T={length} m={m} {way}; the tables say chunk {said}")
                print("".join(f"{cell:>10}" for cell in ("chunk", *(f"ahead {distance}" for distance in distances))))
                chosen = table[m]
                for chunk in (length, *CHUNKS):
                    triton_op.chunk_length = lambda *_, chunk=chunk: chunk
                    times = []
                    for distance in distances:
                        table[m] = distance
                        times.append(milliseconds(make(inputs)))
                    print(f"{chunk:>10}", *(f"{time:9.3f}" for time in times), flush=True)
                table[m] = chosen
                triton_op.chunk_length = chunk_length


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sweep", action="store_true", help="time other chunks and distances of loading ahead")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    if arguments.sweep:
        sweep()
    else:
        compare()


if __name__ == "__main__":
    main()
