"""RMSNorm and the cross-entropy of a linear layer on a GPU: forward and backward, time, peak memory, error.

    PYTHONPATH=kernels python kernels/benchmarks/norm_loss.py [--json PATH]

`MiB` is the most memory held beyond inputs and gradients. `of copy` is how the norm's traffic (x twice, the gradient of
y read, y and the gradient of x written) compares with a copy. `error` is that of the gradients in relative norm, the
worst of them, against float32 arithmetic on the same inputs. What cannot run is a row that says why.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmamba_kernels import linear_cross_entropy
from slotmamba_kernels.cross_entropy import chunked
from timing import DEVICE, Report, Workload, copy_bandwidth, describe_machine, measure, require_gpu
from tuning import tune_quickly

NORM_SHAPES = ((32768, 1024), (32768 * 8, 128))
TOKENS, WIDTH, VOCABULARIES = 16384, 1024, (32000, 50304)
EPS = 1e-6

Function = Callable[..., Tensor]
Inputs = Sequence[Tensor]


def torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def liger_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Not in place: that would overwrite the gradient that it is given."""
    function = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    return function.apply(x, weight, EPS, 0.0, "llama", False)


def fla_norm(x: Tensor, weight: Tensor) -> Tensor:
    return importlib.import_module("fla.modules.norm.layernorm").rms_norm(x, weight, None, eps=EPS)


def norms() -> dict[str, Function]:
    return {
        "torch": torch_norm,
        "torch.compile": torch.compile(torch_norm, dynamic=False),
        "liger": liger_norm,
        "fla": fla_norm,
    }


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits, in float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def liger_loss(hidden: Tensor, weight: Tensor, targets: Tensor, accumulate: torch.dtype | None = None) -> Tensor:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    return module.LigerFusedLinearCrossEntropyLoss(accum_dtype=accumulate)(weight, hidden, targets)


def fla_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    module = importlib.import_module("fla.modules.fused_linear_cross_entropy")
    return module.FusedLinearCrossEntropyLoss()(hidden, targets, weight)


def torch_chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(f"torch {torch.__version__} has no linear_cross_entropy")
    return F.linear_cross_entropy(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


def our_loss(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str, block: int) -> Tensor:
    """Holding `block` logits at a time."""
    chunked.GPU_BLOCK = block
    nll, _, _ = linear_cross_entropy(hidden, weight, targets, backend=backend)
    return nll.mean()


def losses() -> dict[str, Function]:
    return {
        "torch, all logits": plain_loss,
        "torch.compile, all logits": torch.compile(plain_loss, dynamic=False),
        "torch linear_cross_entropy": torch_chunked_loss,
        "liger": liger_loss,
        "liger, added in float32": partial(liger_loss, accumulate=torch.float32),
        "fla": fla_loss,
        "ours, torch, 2^26 logits": partial(our_loss, backend="torch", block=2**26),
        **{f"ours, triton, 2^{e} logits": partial(our_loss, backend="triton", block=2**e) for e in (25, 26, 27)},
    }


class Benchmark:
    """Compares implementations of one function, one row each."""

    def __init__(self) -> None:
        self.report = Report({"what": 28, "ms": 8, "of copy": 8, "MiB": 8, "error": 9, "first s": 8, "note": 0})
        self.bandwidth = copy_bandwidth()

    def compare(self, functions: Mapping[str, Function], inputs: Inputs, exact: Function, moved: int | None) -> None:
        """Differentiated with respect to the floats of `inputs`.

        exact: a plain implementation, which is run in float32; moved: bytes that any of them has to move.
        """
        wanted = gradients(exact, [x.detach().float().requires_grad_() if x.requires_grad else x for x in inputs])
        for name, function in functions.items():
            cells = measure(partial(workload, function, inputs), memory=True)
            if "ms" in cells:
                pairs = zip(gradients(function, inputs), wanted, strict=True)
                cells["error"] = max(float((got.float() - want).norm() / want.norm()) for got, want in pairs)
                if moved is not None:
                    cells["of copy"] = moved / cells["ms"] * 1000 / self.bandwidth
            self.report.add({"what": name, **cells})
            torch.cuda.empty_cache()


def workload(function: Function, inputs: Inputs) -> Workload:
    return Workload(partial(function, *inputs), [x for x in inputs if x.requires_grad])


def gradients(function: Function, inputs: Inputs) -> tuple[Tensor, ...]:
    """Of the output times the same random numbers whoever computes it; a loss is differentiated as it is."""
    o = function(*inputs)
    numbers = torch.Generator(DEVICE).manual_seed(5)
    grad = torch.randn(o.shape, generator=numbers, device=DEVICE).to(o.dtype) if o.ndim else torch.ones_like(o)
    return torch.autograd.grad(o, [x for x in inputs if x.requires_grad], grad)


def leaf(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()


def main() -> None:
    parser = argparse.ArgumentParser(description="RMSNorm and cross-entropy on a GPU.")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    tune_quickly()
    print("  ".join(f"{name} {value}" for name, value in describe_machine().items()))
    benchmark = Benchmark()
    print(f"copy: {benchmark.bandwidth / 1e12:.2f} TB/s, read and written")
    for dtype in (torch.bfloat16, torch.float32):
        for rows, width in NORM_SHAPES:
            benchmark.report.header(f"RMSNorm of [{rows}, {width}], {dtype}")
            inputs = [leaf(rows, width, dtype=dtype), leaf(width, dtype=dtype)]
            benchmark.compare(norms(), inputs, torch_norm, moved=5 * rows * width * dtype.itemsize)
    for vocab in VOCABULARIES:
        benchmark.report.header(f"cross-entropy of [{TOKENS}, {WIDTH}] by [{vocab}, {WIDTH}], {torch.bfloat16}")
        hidden = leaf(TOKENS, WIDTH, dtype=torch.bfloat16)
        weight = leaf(vocab, WIDTH, dtype=torch.bfloat16, scale=0.05)
        benchmark.compare(losses(), [hidden, weight, torch.randint(vocab, (TOKENS,), device=DEVICE)], plain_loss, None)
    if options.json:
        benchmark.report.write_json(options.json, copy_bytes_per_second=benchmark.bandwidth)


if __name__ == "__main__":
    main()
