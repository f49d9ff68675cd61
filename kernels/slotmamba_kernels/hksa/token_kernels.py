"""Triton kernel of HKSA's backward pass, the part parallel over tokens; conventions as in forward_kernels.py.

`token_backward` turns each token's K pairs of (state before, adjoint after), which the chains left, into the gradients
of its inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from slotmamba_kernels.hksa.forward_kernels import load_contents, load_vectors, log1p_minus, store_vectors


@triton.jit
def load_step_vectors(x, offset, d, NS: tl.constexpr, D: tl.constexpr):
    """The vectors of a token's Householder steps: a tuple of [BD], in x's dtype."""
    vectors = ()
    for j in tl.static_range(NS):
        vectors = vectors + (tl.load(x + offset + j * D + d, mask=d < D, other=0.0),)
    return vectors


@triton.jit
def token_backward(
    k, u_k, u_v, beta, w, gamma, a_s, eta,
    source, contents, z_after, alongs, surprise_after, errors, in_k, in_v, in_z, in_surprise,
    adjoint, adjoint_z, pulls, adjoint_surprise,
    c_k, c_v, lam_k, lam_v,
    d_k, d_u_k, d_u_v, d_beta, d_w, d_gamma, d_a_s, d_eta, d_c_k, d_c_v, d_lam_k, d_lam_v,
    start, T, L, R_in, empty_z,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    ENTERING: tl.constexpr, SURPRISE: tl.constexpr, INJECT: tl.constexpr,
):  # fmt: skip
    """One token of one stream, BK slots at a time. d_gamma, d_a_s, d_eta [S, L]: the token's share of the gradients of
    head parameters.

    With P the state before the write, G the adjoint of the state after its steps and x_j = w beta_j, the states between
    the steps are s_j = a P + sum_(m<=j) x_m (u_m - k_m c_m), and their adjoints g_j = G - sum_(m>j) x_m e_m k_m. The
    chains left c_j = k_j . s_(j-1) and e_j = k_j . g_j, `alongs` and `pulls`.
    """
    t = tl.program_id(0)
    s = tl.program_id(1).to(tl.int64)
    b = s // H
    h = s % H
    row = (b * T + start + t) * H + h
    d = tl.arange(0, BD)
    power = tl.load(gamma + h).to(tl.float32)
    keys = load_step_vectors(k, row * (NS * D), d, NS, D)
    writes_k = load_step_vectors(u_k, row * (NS * D), d, NS, D)
    writes_v = load_step_vectors(u_v, row * (NS * D), d, NS, D)
    sizes = ()
    sums_k = ()  # over the slots seen so far, the BK of a block kept apart until the end
    sums_u_k = ()
    sums_u_v = ()
    sums_beta = ()
    for j in tl.static_range(NS):
        sizes = sizes + (tl.load(beta + row * NS + j).to(tl.float32),)
        sums_k = sums_k + (tl.zeros([BK, BD], tl.float32),)
        sums_u_k = sums_u_k + (tl.zeros([BK, BD], tl.float32),)
        sums_u_v = sums_u_v + (tl.zeros([BK, BD], tl.float32),)
        sums_beta = sums_beta + (tl.zeros([BK], tl.float32),)
    sum_gamma = tl.zeros([BK], tl.float32)
    sum_a_s = tl.zeros([BK], tl.float32)
    sum_eta = tl.zeros([BK], tl.float32)

    for block in range(0, K, BK):
        i = block + tl.arange(0, BK)
        used = i < K
        pointer = tl.load(source + ((b * L + t) * H + h) * K + i, mask=used, other=-1)
        event = (s * L + t) * K + i
        gk = load_vectors(adjoint, event * (2 * D), d, used, D, BD).to(tl.float32)
        gv = load_vectors(adjoint, event * (2 * D) + D, d, used, D, BD).to(tl.float32)
        gz = tl.load(adjoint_z + event, mask=used, other=0.0)
        weight = tl.load(w + row * K + i, mask=used, other=0.0).to(tl.float32)
        held_k, held_v, z = load_contents(
            contents, z_after, in_k, in_v, in_z, pointer, s, L * K, R_in, empty_z, d, used, D, BD, ENTERING
        )
        log_keep = log1p_minus(weight)
        decay = tl.exp(power * log_keep)
        along_k = ()
        along_v = ()
        pull_k = ()
        pull_v = ()
        for j in tl.static_range(NS):
            at = (event * NS + j) * 2
            along_k = along_k + (tl.load(alongs + at, mask=used, other=0.0),)
            along_v = along_v + (tl.load(alongs + at + 1, mask=used, other=0.0),)
            pull_k = pull_k + (tl.load(pulls + at, mask=used, other=0.0),)
            pull_v = pull_v + (tl.load(pulls + at + 1, mask=used, other=0.0),)

        if INJECT:
            slot = row * K + i
            share_k = tl.where(weight > 0.0, tl.load(lam_k + slot, mask=used, other=0.0).to(tl.float32), 0.0)
            share_v = tl.where(weight > 0.0, tl.load(lam_v + slot, mask=used, other=0.0).to(tl.float32), 0.0)
            injected_k = load_vectors(c_k, slot * D, d, used, D, BD).to(tl.float32)
            injected_v = load_vectors(c_v, slot * D, d, used, D, BD).to(tl.float32)
            z_now = decay * z + weight
            store_vectors(d_c_k, slot * D, d, used, (share_k * z_now)[:, None] * gk, D, BD)
            store_vectors(d_c_v, slot * D, d, used, (share_v * z_now)[:, None] * gv, D, BD)
            toward_k = tl.sum(gk * injected_k, 1)
            toward_v = tl.sum(gv * injected_v, 1)
            # The state that injection replaced, s_n, against G.
            replaced_k = decay * z * tl.sum(gk * held_k, 1)
            replaced_v = decay * z * tl.sum(gv * held_v, 1)
            for m in tl.static_range(NS):
                step = weight * sizes[m]
                key = keys[m].to(tl.float32)[None, :]
                replaced_k += step * tl.sum(gk * (writes_k[m].to(tl.float32)[None, :] - key * along_k[m][:, None]), 1)
                replaced_v += step * tl.sum(gv * (writes_v[m].to(tl.float32)[None, :] - key * along_v[m][:, None]), 1)
            tl.store(d_lam_k + slot, tl.where(weight > 0.0, z_now * toward_k - replaced_k, 0.0), mask=used)
            tl.store(d_lam_v + slot, tl.where(weight > 0.0, z_now * toward_v - replaced_v, 0.0), mask=used)
            gz += share_k * toward_k + share_v * toward_v
            gk *= (1.0 - share_k)[:, None]
            gv *= (1.0 - share_v)[:, None]

        # Forward through the states between the steps, then backward through their adjoints.
        sk = (decay * z)[:, None] * held_k
        sv = (decay * z)[:, None] * held_v
        pulled = ()
        for j in tl.static_range(NS):
            step = weight * sizes[j]
            sums = sums_k[j] - (step * pull_k[j])[:, None] * sk
            pulled = pulled + (sums - (step * pull_v[j])[:, None] * sv,)
            if j < NS - 1:
                key = keys[j].to(tl.float32)[None, :]
                sk += step[:, None] * writes_k[j].to(tl.float32)[None, :]
                sv += step[:, None] * writes_v[j].to(tl.float32)[None, :]
                sk -= (step * along_k[j])[:, None] * key
                sv -= (step * along_v[j])[:, None] * key
        sums_k = ()
        written_k = ()
        written_v = ()
        betas = ()
        d_weight = gz
        for j in tl.static_range(NS - 1, -1, -1):
            step = weight * sizes[j]
            key = keys[j].to(tl.float32)[None, :]
            toward = tl.sum(gk * writes_k[j].to(tl.float32)[None, :] + gv * writes_v[j].to(tl.float32)[None, :], 1)
            d_step = toward - along_k[j] * pull_k[j] - along_v[j] * pull_v[j]
            d_weight += sizes[j] * d_step
            betas = (sums_beta[j] + weight * d_step,) + betas
            sums = pulled[j] - (step * along_k[j])[:, None] * gk
            sums_k = (sums - (step * along_v[j])[:, None] * gv,) + sums_k
            written_k = (sums_u_k[j] + step[:, None] * gk,) + written_k
            written_v = (sums_u_v[j] + step[:, None] * gv,) + written_v
            gk -= (step * pull_k[j])[:, None] * key
            gv -= (step * pull_v[j])[:, None] * key
        sums_u_k = written_k
        sums_u_v = written_v
        sums_beta = betas
        d_decay = z * (tl.sum(held_k * gk + held_v * gv, 1) + gz)

        follows = weight <= 0.999  # above it the decay no longer depends on w
        d_weight -= tl.where(follows, d_decay * power * decay / (1.0 - tl.minimum(weight, 0.999)), 0.0)
        sum_gamma += d_decay * decay * log_keep
        if SURPRISE:
            stored = used & (pointer >= 0)
            score = tl.load(surprise_after + s * L * K + tl.maximum(pointer, 0), mask=stored, other=0.0)
            if ENTERING:
                enters = used & (pointer <= -2)
                memory = s * R_in + tl.maximum(-2 - pointer, 0)
                score += tl.load(in_surprise + memory, mask=enters, other=0.0)
            error_k = tl.load(errors + event * 2, mask=used, other=0.0)
            error_v = tl.load(errors + event * 2 + 1, mask=used, other=0.0)
            gs = tl.load(adjoint_surprise + event, mask=used, other=0.0)
            mix = tl.load(a_s + h).to(tl.float32)
            forget = 1.0 - tl.load(eta + h).to(tl.float32)
            d_rate = gs * (mix * error_k + (1.0 - mix) * error_v - score)
            d_weight += forget * d_rate
            sum_a_s += gs * forget * weight * (error_k - error_v)
            sum_eta -= d_rate * weight
        tl.store(d_w + row * K + i, d_weight, mask=used)

    for j in tl.static_range(NS):
        at = (row * NS + j) * D + d
        tl.store(d_k + at, tl.sum(sums_k[j], 0).to(d_k.dtype.element_ty), mask=d < D)
        tl.store(d_u_k + at, tl.sum(sums_u_k[j], 0).to(d_u_k.dtype.element_ty), mask=d < D)
        tl.store(d_u_v + at, tl.sum(sums_u_v[j], 0).to(d_u_v.dtype.element_ty), mask=d < D)
        tl.store(d_beta + row * NS + j, tl.sum(sums_beta[j], 0))
    tl.store(d_gamma + s * L + t, tl.sum(sum_gamma, 0))
    if SURPRISE:
        tl.store(d_a_s + s * L + t, tl.sum(sum_a_s, 0))
        tl.store(d_eta + s * L + t, tl.sum(sum_eta, 0))
