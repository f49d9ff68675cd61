"""The mix of two slot memories in one kernel each way (hksa.md, section 4).

A program mixes ROWS of the R rows of one stream s = b*H + h, each from a row of `own` and a row of `below`. With GATHER
these are looked up in own_row and below_row [S, R] (int32), -1 for a slot as before any token, whose normaliser is
empty_z and all else 0; otherwise row r is mixed from the rows r.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

SURPRISE_FLOOR = tl.constexpr(1e-6)  # as in vectorized.py
SIZES = ("R", "R_own", "R_below")  # of sparse memories they depend on the data: no kernel is compiled for one of them


@triton.jit
def rows_at(rows, s, r, live, R, R_from, GATHER: tl.constexpr):
    """Where rows r of the mix come from: the row's number among all rows of the memory, and whether there is one."""
    row = r
    found = live
    if GATHER:
        row = tl.load(rows + s * R + r, mask=live, other=-1)
        found = row >= 0
    return s * R_from + row, found


@triton.jit
def load_scores(z, surprise, at, found, empty_z):
    return tl.load(z + at, mask=found, other=empty_z), tl.load(surprise + at, mask=found, other=0.0)


@triton.jit
def load_vectors(x, at, found, d, D: tl.constexpr):
    return tl.load(x + (at * D)[:, None] + d[None, :], mask=found[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def store_vectors(x, at, value, mask, d, D: tl.constexpr):
    tl.store(x + (at * D)[:, None] + d[None, :], value, mask=mask[:, None] & (d[None, :] < D))


@triton.jit
def gate_of(surprise, bias, slope, h):
    """The share of the own memory, that of the memory below, and log(surprise + 1e-6)."""
    log_surprise = tl.log(surprise + SURPRISE_FLOOR)
    x = tl.load(bias + h) + tl.load(slope + h) * log_surprise
    return 1.0 / (1.0 + tl.exp(-x)), 1.0 / (1.0 + tl.exp(x)), log_surprise


@triton.jit(do_not_specialize=SIZES)
def mix_forward(
    own_k, own_v, own_z, own_surprise, below_k, below_v, below_z, below_surprise, bias, slope, own_row, below_row,
    out_k, out_v, out_z, out_surprise,
    R, R_own, R_below, empty_z,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BD)
    live = r < R
    mine, has_mine = rows_at(own_row, s, r, live, R, R_own, GATHER)
    other, has_other = rows_at(below_row, s, r, live, R, R_below, GATHER)
    z, surprise = load_scores(own_z, own_surprise, mine, has_mine, empty_z)
    z_below, surprise_below = load_scores(below_z, below_surprise, other, has_other, empty_z)
    g, rest, _ = gate_of(surprise, bias, slope, s % H)
    out = s * R + r
    tl.store(out_z + out, g * z + rest * z_below, mask=live)
    tl.store(out_surprise + out, g * surprise + rest * surprise_below, mask=live)
    k = g[:, None] * load_vectors(own_k, mine, has_mine, d, D)
    k += rest[:, None] * load_vectors(below_k, other, has_other, d, D)
    store_vectors(out_k, out, k, live, d, D)
    v = g[:, None] * load_vectors(own_v, mine, has_mine, d, D)
    v += rest[:, None] * load_vectors(below_v, other, has_other, d, D)
    store_vectors(out_v, out, v, live, d, D)


@triton.jit
def mix_vectors_backward(d_out, own, below, d_own, d_below, out, mine, other, live, has_mine, has_other, g, rest, d,
                         D: tl.constexpr):  # fmt: skip
    """Of one of the two memories of vectors. Returns its share of the gradient of g [ROWS]."""
    grad = load_vectors(d_out, out, live, d, D)
    difference = load_vectors(own, mine, has_mine, d, D) - load_vectors(below, other, has_other, d, D)
    store_vectors(d_own, mine, g[:, None] * grad, has_mine, d, D)
    store_vectors(d_below, other, rest[:, None] * grad, has_other, d, D)
    return tl.sum(grad * difference, 1)


@triton.jit(do_not_specialize=SIZES)
def mix_backward(
    d_out_k, d_out_v, d_out_z, d_out_surprise,
    own_k, own_v, own_z, own_surprise, below_k, below_v, below_z, below_surprise, bias, slope, own_row, below_row,
    d_own_k, d_own_v, d_own_z, d_own_surprise, d_below_k, d_below_v, d_below_z, d_below_surprise, d_bias, d_slope,
    R, R_own, R_below, empty_z,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """d_bias, d_slope: [S, programs of a stream], the sums over a program's rows."""
    s = tl.program_id(1).to(tl.int64)
    h = s % H
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BD)
    live = r < R
    mine, has_mine = rows_at(own_row, s, r, live, R, R_own, GATHER)
    other, has_other = rows_at(below_row, s, r, live, R, R_below, GATHER)
    z, surprise = load_scores(own_z, own_surprise, mine, has_mine, empty_z)
    z_below, surprise_below = load_scores(below_z, below_surprise, other, has_other, empty_z)
    g, rest, log_surprise = gate_of(surprise, bias, slope, h)
    out = s * R + r
    grad_z = tl.load(d_out_z + out, mask=live, other=0.0)
    grad_surprise = tl.load(d_out_surprise + out, mask=live, other=0.0)
    d_g = grad_z * (z - z_below) + grad_surprise * (surprise - surprise_below)
    d_g += mix_vectors_backward(
        d_out_k, own_k, below_k, d_own_k, d_below_k, out, mine, other, live, has_mine, has_other, g, rest, d, D
    )
    d_g += mix_vectors_backward(
        d_out_v, own_v, below_v, d_own_v, d_below_v, out, mine, other, live, has_mine, has_other, g, rest, d, D
    )
    d_x = d_g * g * rest
    through_gate = d_x * tl.load(slope + h) / (surprise + SURPRISE_FLOOR)
    tl.store(d_own_z + mine, g * grad_z, mask=has_mine)
    tl.store(d_own_surprise + mine, g * grad_surprise + through_gate, mask=has_mine)
    tl.store(d_below_z + other, rest * grad_z, mask=has_other)
    tl.store(d_below_surprise + other, rest * grad_surprise, mask=has_other)
    program = s * tl.num_programs(0) + tl.program_id(0)
    tl.store(d_bias + program, tl.sum(tl.where(live, d_x, 0.0), 0))
    tl.store(d_slope + program, tl.sum(tl.where(live, d_x * log_surprise, 0.0), 0))
