"""The layers that HKSA is compared with, each at D = 1024: 8 heads of 128 (Mamba-2: expand 2, 32 heads of 64, N = 128).

All take what HKSA takes: queries, keys, gates ready made, bfloat16 with decays in float32, a batch without padding.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from timing import DEVICE, Workload

HEADS, DIM = 8, 128
GSA_SLOTS = 64
GUARD_OFF = "fla's Hopper guard off: its speed, not its values"


@dataclass(frozen=True)
class Peer:
    """A layer to compare with.

    make: (batch, length) -> its workload; raises ImportError where its package is missing.
    guarded: whether fla refuses its backward pass on some cards.
    slow_start: whether its first call tunes for minutes.
    """

    name: str
    make: Callable[[int, int], Workload]
    guarded: bool = False
    slow_start: bool = False

    @property
    def note(self) -> str:
        """What has to be said beside times measured so far."""
        return GUARD_OFF if self.guarded and _lifted else ""


def _lift_guard() -> None:
    """Lets the backward pass of fla's gated layers run where fla refuses it.

    With Triton from 3.4 to before 3.7.1 that pass computes wrong numbers on Hopper cards, so fla raises. The kernels
    run all the same and take the time that they would take if they were right, which is all that is asked of them here.
    """
    chunk_o: Any = importlib.import_module("fla.ops.common.chunk_o")
    if chunk_o.IS_NVIDIA_HOPPER and chunk_o.TRITON_ABOVE_3_4_0 and not chunk_o.TRITON_ABOVE_3_7_1:
        chunk_o.TRITON_ABOVE_3_7_1 = True
        _lifted.append("gated chunk_bwd_dqkwg")


_lifted: list[str] = []


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def _unit(*shape: int) -> Tensor:
    return F.normalize(_normal(*shape, dtype=torch.float32), dim=-1).to(torch.bfloat16)


def _log_decay(*shape: int) -> Tensor:
    """Logarithms of decays as a trained layer has them: half-lives of a few to a few hundred tokens."""
    return F.logsigmoid(_normal(*shape, dtype=torch.float32) + 3)


def _sdpa(backend: SDPBackend) -> Callable[[int, int], Workload]:
    def make(batch: int, length: int) -> Workload:
        q, k, v = _leaves(*(_normal(batch, length, HEADS, DIM) for _ in range(3)))

        def forward() -> Tensor:
            with sdpa_kernel(backend):
                o = F.scaled_dot_product_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
                )
            return o.transpose(1, 2)

        return Workload(forward, [q, k, v])

    return make


def _flash_attn(batch: int, length: int) -> Workload:
    flash_attn_func = importlib.import_module("flash_attn").flash_attn_func
    q, k, v = _leaves(*(_normal(batch, length, HEADS, DIM) for _ in range(3)))
    return Workload(lambda: flash_attn_func(q, k, v, causal=True), [q, k, v])


def _delta_product(steps: int, gated: bool) -> Callable[[int, int], Workload]:
    """The gated delta rule for one step, the gated delta product for more; without a gate fla has no guard."""

    def make(batch: int, length: int) -> Workload:
        if gated:
            _lift_guard()
        rows = (batch, length * steps, HEADS)
        q, v, k = _normal(batch, length, HEADS, DIM), _normal(*rows, DIM), _unit(*rows, DIM)
        beta = torch.rand(rows, device=DEVICE).to(torch.bfloat16)
        inputs = _leaves(q, k, v, beta, *([_log_decay(batch, length, HEADS)] if gated else []))
        q, k, v, beta = inputs[:4]
        g = inputs[4] if gated else None
        if steps == 1:
            rule = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
            return Workload(lambda: rule(q, k, v, g, beta)[0], inputs)
        product = importlib.import_module("fla.ops.gated_delta_product").chunk_gated_delta_product
        return Workload(lambda: product(q, k, v, g, beta, num_householder=steps)[0], inputs)

    return make


def _kda(batch: int, length: int) -> Workload:
    chunk_kda = importlib.import_module("fla.ops.kda").chunk_kda
    rows = (batch, length, HEADS)
    q, k, v, g, beta, A_log, dt_bias = _leaves(
        _unit(*rows, DIM),
        _unit(*rows, DIM),
        _normal(*rows, DIM),
        _normal(*rows, DIM),
        torch.rand(rows, device=DEVICE).to(torch.bfloat16),
        torch.rand(HEADS, device=DEVICE),
        torch.randn(HEADS * DIM, device=DEVICE) - 3,
    )

    def forward() -> Tensor:
        """Its gate is made inside, as in its own layer: a ready-made one would be as large as the queries, in fp32."""
        return chunk_kda(q, k, v, g, beta, use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias)[0]

    return Workload(forward, [q, k, v, g, beta, A_log, dt_bias])


def _gsa(batch: int, length: int) -> Workload:
    chunk_gsa = importlib.import_module("fla.ops.gsa").chunk_gsa
    rows = (batch, length, HEADS)
    gate = _log_decay(*rows, GSA_SLOTS)
    written = (1 - gate.exp()).to(torch.bfloat16)
    q, k, v, s, g = _leaves(*(_normal(*rows, DIM) for _ in range(3)), written, gate.to(torch.bfloat16))
    return Workload(lambda: chunk_gsa(q, k, v, s, g)[0], [q, k, v, s, g])


def _mamba2(batch: int, length: int) -> Workload:
    from slotmamba_kernels.ssd.mamba import mamba_installed

    # Looks past what the package imports and does not need; afterwards its modules can be had as usual.
    if not mamba_installed():
        raise ImportError("mamba-ssm is not installed or does not import")
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    heads, dim, states = 2 * HEADS * DIM // 64, 64, 128
    x, B, C, dt, A, D = _leaves(
        _normal(batch, length, heads, dim),
        _normal(batch, length, 1, states),
        _normal(batch, length, 1, states),
        F.softplus(_normal(batch, length, heads, dtype=torch.float32) - 3).to(torch.bfloat16),
        -torch.rand(heads, device=DEVICE) * 15 - 1,
        torch.randn(heads, device=DEVICE),
    )
    return Workload(lambda: scan(x, dt, A, B, C, chunk_size=256, D=D), [x, dt, A, B, C, D])


PEERS = (
    Peer("flash attention (SDPA)", _sdpa(SDPBackend.FLASH_ATTENTION)),
    Peer("cuDNN attention (SDPA)", _sdpa(SDPBackend.CUDNN_ATTENTION)),
    Peer("flash-attn", _flash_attn),
    Peer("fla gated delta product, n=2", _delta_product(2, gated=True), guarded=True),
    Peer("fla gated delta rule", _delta_product(1, gated=True), guarded=True),
    Peer("fla delta product, n=2, no gate", _delta_product(2, gated=False)),
    Peer("fla KDA", _kda),
    Peer(f"fla GSA, {GSA_SLOTS} slots", _gsa),
    Peer("Mamba-2 SSD", _mamba2, slow_start=True),
)
