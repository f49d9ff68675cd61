"""Triton kernel of HKSA's backward pass, the part parallel over tokens; conventions as in forward_kernels.py.

`token_backward` turns each token's K pairs of (state before, adjoint after), which the chains left, into the gradients
of its inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from slotmamba_kernels.hksa.forward_kernels import load_pair, store_pair, token_of_program


@triton.jit
def load_step_vectors(k, u_k, u_v, row, d, NS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Of each of a token's Householder steps k_j (twice) and u_kj, u_vj, [2, BD] in their dtype: two tuples."""
    keys = ()
    targets = ()
    for j in tl.static_range(NS):
        keys = keys + (load_pair(k + j * D, k + j * D, row, d, True, D, BD),)
        targets = targets + (load_pair(u_k + j * D, u_v + j * D, row, d, True, D, BD),)
    return keys, targets


@triton.jit
def load_slot(source, contents, adjoint, i, row, d, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """What takes long to load of a token's write to slot i of its K, arguments from the token's first on: the code of
    the state before, the adjoint after, and the state before if a write left it (as S / z), [2, BD] in their dtype."""
    used = i < K
    pointer = tl.load(source + i, mask=used, other=-1)
    here = adjoint + i * (2 * D)
    grad = load_pair(here, here + D, row, d, used, D, BD)
    before = contents + tl.maximum(pointer, 0) * (2 * D)
    return pointer, grad, load_pair(before, before + D, row, d, pointer >= 0, D, BD)


@triton.jit
def token_backward(
    k, u_k, u_v, beta, w, log_keep, gamma, a_s, eta,
    source, contents, z_after, alongs, surprise_after, errors, in_k, in_v, in_z, in_surprise,
    adjoint, adjoint_z, pulls, adjoint_surprise,
    c_k, c_v, lam_k, lam_v,
    d_k, d_u_k, d_u_v, d_beta, d_w, d_gamma, d_a_s, d_eta, d_c_k, d_c_v, d_lam_k, d_lam_v,
    start, T, L, R_in, empty_z,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    ENTERING: tl.constexpr, SURPRISE: tl.constexpr, INJECT: tl.constexpr,
):  # fmt: skip
    """One token of one stream, slot after slot, the next one loaded ahead. d_gamma, d_a_s, d_eta [S, L]: the token's
    share of the gradients of head parameters.

    With P the state before the write, G the adjoint of the state after its steps and x_j = w beta_j, the states between
    the steps are s_j = a P + sum_(m<=j) x_m (u_m - k_m c_m), and their adjoints g_j = G - sum_(m>j) x_m e_m k_m. The
    chains left c_j = k_j . s_(j-1) and e_j = k_j . g_j, `alongs` and `pulls`.
    """
    t, h, b, s = token_of_program(H)
    at_token = (b * T + start + t) * H + h
    d = tl.arange(0, BD)
    row = tl.arange(0, 2)
    power = tl.load(gamma + h).to(tl.float32)
    vectors = at_token * (NS * D)
    keys, targets = load_step_vectors(k + vectors, u_k + vectors, u_v + vectors, row, d, NS, D, BD)
    in_stretch = ((b * L + t) * H + h) * K
    source += in_stretch
    log_keep += in_stretch
    event0 = (s * L + t) * K
    contents += s * L * K * (2 * D)
    z_after += s * L * K
    adjoint += event0 * (2 * D)
    sizes = ()
    sums_k = ()
    sums_u = ()
    sums_beta = ()
    for j in tl.static_range(NS):
        sizes = sizes + (tl.load(beta + at_token * NS + j).to(tl.float32),)
        sums_k = sums_k + (tl.zeros([2, BD], tl.float32),)
        sums_u = sums_u + (tl.zeros([2, BD], tl.float32),)
        sums_beta = sums_beta + (0.0,)
    sum_gamma = 0.0
    sum_a_s = 0.0
    sum_eta = 0.0

    ahead = load_slot(source, contents, adjoint, 0, row, d, K, D, BD)
    for i in range(K):
        loaded = ahead
        ahead = load_slot(source, contents, adjoint, i + 1, row, d, K, D, BD)
        pointer = loaded[0]
        grad = loaded[1].to(tl.float32)
        held = loaded[2].to(tl.float32)
        z = tl.where(pointer >= 0, tl.load(z_after + tl.maximum(pointer, 0), mask=pointer >= 0, other=1.0), empty_z)
        if ENTERING:
            if pointer <= -2:
                memory = s * R_in - 2 - pointer
                z = tl.load(in_z + memory)
                held = load_pair(in_k + memory * D, in_v + memory * D, row, d, True, D, BD) / z
        grad_z = tl.load(adjoint_z + event0 + i)
        weight = tl.load(w + at_token * K + i).to(tl.float32)
        log_kept = tl.load(log_keep + i)
        decay = tl.exp(power * log_kept)
        along = ()
        pull = ()
        for j in tl.static_range(NS):
            at = ((event0 + i) * NS + j) * 2 + row
            along = along + (tl.load(alongs + at),)
            pull = pull + (tl.load(pulls + at),)

        if INJECT:
            slot = at_token * K + i
            share = tl.load(tl.where(row == 0, lam_k, lam_v) + slot).to(tl.float32)
            share = tl.where(weight > 0.0, share, 0.0)
            injected = load_pair(c_k + slot * D, c_v + slot * D, row, d, True, D, BD).to(tl.float32)
            z_now = decay * z + weight
            d_injected = (share * z_now)[:, None] * grad
            store_pair(d_c_k + slot * D, d_c_v + slot * D, row, d, d_injected, D, BD)
            toward = tl.sum(grad * injected, 1)
            replaced = decay * z * tl.sum(grad * held, 1)  # the state that injection replaced, s_n, against G
            for m in tl.static_range(NS):
                written = targets[m].to(tl.float32) - keys[m].to(tl.float32) * along[m][:, None]
                replaced += weight * sizes[m] * tl.sum(grad * written, 1)
            d_share = tl.where(weight > 0.0, z_now * toward - replaced, 0.0)
            tl.store(tl.where(row == 0, d_lam_k, d_lam_v) + slot, d_share)
            grad_z += tl.sum(share * toward, 0)
            grad *= (1.0 - share)[:, None]

        # Forward through the states between the steps, then backward through their adjoints.
        state = (decay * z) * held
        pulled = ()
        for j in tl.static_range(NS):
            step = weight * sizes[j]
            pulled = pulled + (sums_k[j] - (step * pull[j])[:, None] * state,)
            if j < NS - 1:
                state += step * targets[j].to(tl.float32)
                state -= (step * along[j])[:, None] * keys[j].to(tl.float32)
        sums_k = ()
        written = ()
        betas = ()
        d_weight = grad_z
        for j in tl.static_range(NS - 1, -1, -1):
            step = weight * sizes[j]
            toward = tl.sum(tl.sum(grad * targets[j].to(tl.float32), 1) - along[j] * pull[j], 0)
            d_weight += sizes[j] * toward
            betas = (sums_beta[j] + weight * toward,) + betas
            sums_k = (pulled[j] - (step * along[j])[:, None] * grad,) + sums_k
            written = (sums_u[j] + step * grad,) + written
            grad -= (step * pull[j])[:, None] * keys[j].to(tl.float32)
        sums_u = written
        sums_beta = betas
        d_decay = z * (tl.sum(tl.sum(held * grad, 1), 0) + grad_z)

        follows = weight <= 0.999  # above it the decay no longer depends on w
        d_weight -= tl.where(follows, d_decay * power * decay / (1.0 - tl.minimum(weight, 0.999)), 0.0)
        sum_gamma += d_decay * decay * log_kept
        if SURPRISE:
            score = tl.load(surprise_after + s * L * K + tl.maximum(pointer, 0), mask=pointer >= 0, other=0.0)
            if ENTERING:
                score += tl.load(in_surprise + s * R_in + tl.maximum(-2 - pointer, 0), mask=pointer <= -2, other=0.0)
            error_k = tl.load(errors + (event0 + i) * 2)
            error_v = tl.load(errors + (event0 + i) * 2 + 1)
            d_score = tl.load(adjoint_surprise + event0 + i)
            mix = tl.load(a_s + h).to(tl.float32)
            forget = 1.0 - tl.load(eta + h).to(tl.float32)
            d_rate = d_score * (mix * error_k + (1.0 - mix) * error_v - score)
            d_weight += forget * d_rate
            sum_a_s += d_score * forget * weight * (error_k - error_v)
            sum_eta -= d_rate * weight
        tl.store(d_w + at_token * K + i, d_weight)

    for j in tl.static_range(NS):
        at = vectors + j * D
        store_pair(d_u_k + at, d_u_v + at, row, d, sums_u[j], D, BD)
        tl.store(d_k + at + d, tl.sum(sums_k[j], 0).to(d_k.dtype.element_ty), mask=d < D)
        tl.store(d_beta + at_token * NS + j, sums_beta[j])
    tl.store(d_gamma + s * L + t, sum_gamma)
    if SURPRISE:
        tl.store(d_a_s + s * L + t, sum_a_s)
        tl.store(d_eta + s * L + t, sum_eta)
