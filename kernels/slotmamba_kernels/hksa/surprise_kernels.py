"""Triton kernels of the surprise score (hksa.md section 4) along each chain: a decaying average of the errors that the
walk over the chains left, and its adjoint. Conventions as in forward_kernels.py.

The score after a write is affine in the one before, so TILE writes of a bucket are done at a time by a scan.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def compose(scale_a, shift_a, scale_b, shift_b):
    """The affine map b after a."""
    return scale_a * scale_b, shift_a * scale_b + shift_b


@triton.jit
def last_of(x, place, TILE: tl.constexpr):
    return tl.sum(tl.where(place == TILE - 1, x, 0.0), 0)


@triton.jit
def surprise_forward(
    w, order, previous, leaving, bucket, errors, a_s, eta, in_surprise, surprise_after, out_surprise,
    start, T, L, R_in, R_out, buckets,
    H: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, ENTERING: tl.constexpr, LEAVING: tl.constexpr,
):  # fmt: skip
    """The score after each write of a bucket, surprise_after [S, L*K], from errors [S, L*K, 2]."""
    s = tl.program_id(1).to(tl.int64)
    b = s // H
    h = s % H
    place = tl.arange(0, TILE)
    at_bucket = bucket + s * (buckets + 1) + tl.program_id(0)
    first = tl.load(at_bucket)
    last = tl.load(at_bucket + 1)
    mix = tl.load(a_s + h).to(tl.float32)
    forget = 1.0 - tl.load(eta + h).to(tl.float32)
    w += ((b * T + start) * H + h) * K
    writes = s * L * K
    score = 0.0
    for begin in range(first, last, TILE):
        p = begin + place
        live = p < last
        event = tl.load(order + writes + p, mask=live, other=0)
        source = tl.load(previous + writes + p, mask=live, other=0)
        error_k = tl.load(errors + (writes + event) * 2, mask=live, other=0.0)
        error_v = tl.load(errors + (writes + event) * 2 + 1, mask=live, other=0.0)
        rate = forget * tl.load(w + event // K * (H * K) + event % K, mask=live, other=0.0).to(tl.float32)
        shift = rate * (mix * error_k + (1.0 - mix) * error_v)
        if ENTERING:
            enters = live & (source <= -2)
            shift += (1.0 - rate) * tl.load(in_surprise + s * R_in - 2 - source, mask=enters, other=0.0)
        scale = tl.where(source >= 0, 1.0 - rate, 0.0)
        scale, shift = tl.associative_scan((scale, shift), 0, compose)
        after = scale * score + shift
        tl.store(surprise_after + writes + event, after, mask=live)
        if LEAVING:
            left = tl.load(leaving + writes + p, mask=live, other=-1)
            tl.store(out_surprise + s * R_out + left, after, mask=left >= 0)
        score = last_of(after, place, TILE)


@triton.jit
def surprise_backward(
    w, order, previous, leaving, bucket, eta, d_out_surprise, adjoint_surprise, d_in_surprise,
    start, T, L, R_in, R_out, buckets,
    H: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, ENTERING: tl.constexpr,
):  # fmt: skip
    """adjoint_surprise [S, L*K]: of the score after each write, which only the leaving memory shows; d_in_surprise: of
    the entering memory's rows that a chain starts from."""
    s = tl.program_id(1).to(tl.int64)
    b = s // H
    h = s % H
    place = tl.arange(0, TILE)
    at_bucket = bucket + s * (buckets + 1) + tl.program_id(0)
    first = tl.load(at_bucket)
    last = tl.load(at_bucket + 1)
    forget = 1.0 - tl.load(eta + h).to(tl.float32)
    w += ((b * T + start) * H + h) * K
    writes = s * L * K
    score = 0.0
    for begin in range(0, last - first, TILE):
        p = last - 1 - begin - place
        live = p >= first
        event = tl.load(order + writes + p, mask=live, other=0)
        left = tl.load(leaving + writes + p, mask=live, other=-1)
        shift = tl.load(d_out_surprise + s * R_out + left, mask=left >= 0, other=0.0)
        # The write after it hands on what of the score it keeps, if it goes on from it.
        follows = live & (p + 1 < last)
        next_event = tl.load(order + writes + p + 1, mask=follows, other=0)
        next_source = tl.load(previous + writes + p + 1, mask=follows, other=-1)
        next_weight = tl.load(w + next_event // K * (H * K) + next_event % K, mask=follows, other=0.0).to(tl.float32)
        scale = tl.where(next_source >= 0, 1.0 - forget * next_weight, 0.0)
        scale, shift = tl.associative_scan((scale, shift), 0, compose)
        adjoint = scale * score + shift
        tl.store(adjoint_surprise + writes + event, adjoint, mask=live)
        if ENTERING:
            source = tl.load(previous + writes + p, mask=live, other=-1)
            weight = tl.load(w + event // K * (H * K) + event % K, mask=live, other=0.0).to(tl.float32)
            into = d_in_surprise + s * R_in - 2 - source
            tl.store(into, (1.0 - forget * weight) * adjoint, mask=source <= -2)
        score = last_of(adjoint, place, TILE)
