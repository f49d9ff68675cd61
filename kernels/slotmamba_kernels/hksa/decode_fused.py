"""A decoding step in one kernel, as an op that torch.compile sees."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from slotmamba_kernels.custom_op import custom_op
from slotmamba_kernels.hksa.decode_kernels import step_kernel

# Numbers a thread can hold while it finds addresses on its own. Registers are plenty: programs are few in decoding.
PRIVATE_NUMBERS = 200


@custom_op("slotmamba::hksa_step", mutates_args=("s_k", "s_v", "z", "surprised"))
def hksa_step_fused(
    q: Tensor,
    k: Tensor,
    u_k: Tensor,
    u_v: Tensor,
    beta: Tensor,
    write_logits: Tensor,
    read_logits: Tensor,
    gamma: Tensor,
    a_s: Tensor | None,
    eta: Tensor | None,
    s_k: Tensor,
    s_v: Tensor,
    z: Tensor,
    surprised: Tensor,
    top_k: int,
) -> Tensor:
    """See `slotmamba_kernels.hksa_step_`; the arguments are checked and contiguous."""
    o = torch.empty_like(q)
    batch, heads, steps, dim = k.shape
    factors, size = write_logits.shape[-2:]
    d, p, beam = (triton.next_power_of_2(x) for x in (dim, size, top_k))
    # A thread for each number of a vector: few programs run, so each has to be quick on its own.
    warps = max(d // 32, p // 512, 1)
    step_kernel[(batch * heads,)](
        q, k, u_k, u_v, beta, write_logits, read_logits, gamma, a_s, eta, s_k, s_v, z, surprised, o,
        heads, z.shape[-1], dim**-0.5,
        DIM=dim, D=d, STEPS=steps, FACTORS=factors, SIZE=size, P=p, K=top_k, BEAM=beam,
        COLUMNS=32 * warps if 3 * p + 4 * beam <= PRIVATE_NUMBERS else 2, num_warps=warps,
    )  # fmt: skip
    return o


@hksa_step_fused.register_fake
def _(q: Tensor, *others: Tensor | int | None) -> Tensor:
    return torch.empty_like(q)
