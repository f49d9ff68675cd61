"""A layer's slot memory over a row that is cut into segments, each begun from a mix with the layer below's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slotmamba_kernels.backends import choose_backend
from slotmamba_kernels.dtypes import state_dtype
from slotmamba_kernels.hksa import fits_triton, hksa
from slotmamba_kernels.hksa.arguments import Inject, Surprise, check_arguments, documents_of, wide_indices
from slotmamba_kernels.hksa.state import MAX_OFFSET, MOST_BUCKETS, SlotState, SparseSlotState
from slotmamba_kernels.threading.mix import thread_slots

Gate = tuple[Tensor, Tensor]
InjectSegment = Callable[[slice, SlotState | None], Inject]


class SegmentEnds:
    """A layer's memories at the ends of consecutive segments.

    Those of the first N segments may be parts of tensors [B, N, H, M(, d)]; all others are tensors of their own.
    """

    def __init__(self, states: Sequence[SlotState] = (), *, stacked: SlotState | None = None) -> None:
        self._stacked, self._states = stacked, list(states)
        self._in_stack = 0 if stacked is None else stacked.z.shape[1]

    def __len__(self) -> int:
        return self._in_stack + len(self._states)

    def __getitem__(self, number: int) -> SlotState:
        number = range(len(self))[number]
        if self._stacked is None or number >= self._in_stack:
            return self._states[number - self._in_stack]
        return self._stacked.map(lambda x: x[:, number])

    def kinds(self) -> set[tuple[tuple[int, ...], frozenset[torch.dtype]]]:
        """B, H, M, d and the dtypes of the memories, of all different ones."""
        states = self._states if self._stacked is None else [self._stacked, *self._states]
        found: set[tuple[tuple[int, ...], frozenset[torch.dtype]]] = set()
        for state in states:
            batch, *_, heads, _, dim = state.S_k.shape
            dtypes = frozenset(x.dtype for x in (state.S_k, state.S_v, state.z, state.surprise))
            found.add(((batch, heads, state.num_slots, dim), dtypes))
        return found

    def stacked(self, count: int) -> SlotState:
        """Those of the first `count` segments, dense, as tensors [B, count, H, M(, d)].

        One more than there are is allowed: in its place, which nobody is to look at, stands the last.
        """
        if self._stacked is not None and count == self._in_stack:
            return self._stacked
        assert count <= len(self) + 1
        parts = [vars(self[min(number, len(self) - 1)].dense()) for number in range(count)]
        return SlotState(*(torch.stack([part[name] for part in parts], 1) for name in parts[0]))


def hksa_threaded(
    q: Tensor,
    k: Tensor,
    u_k: Tensor,
    u_v: Tensor,
    beta: Tensor,
    write_idx: Tensor,
    write_w: Tensor,
    read_idx: Tensor,
    read_w: Tensor,
    gamma: Tensor,
    *,
    num_slots: int,
    segment_len: int,
    gate: Gate | None = None,
    below: SegmentEnds | None = None,
    state: SlotState | None = None,
    doc_start: Tensor | None = None,
    surprise: Surprise | None = None,
    inject: InjectSegment | None = None,
    backend: str = "auto",
    return_state: bool = True,
) -> tuple[Tensor, SegmentEnds]:
    """`hksa` segment by segment, with `thread_slots` at the boundaries between (hksa.md, section 4).

    Backend "triton" runs all segments at once where it can: for memories of at most 1024 slots, with surprise, without
    injection, and T a multiple of segment_len but for a rest, which follows on its own.

    Args:
        q ... gamma, num_slots, doc_start, surprise, backend: as in `hksa`.
        segment_len: tokens of a segment; the last may be shorter.
        gate: (bias, slope), [H] each, of `thread_slots`; None: segments begin with this layer's own memory.
        below: memories of the layer below at the ends of these segments, given with a gate; that at the end of the last
            segment is not looked at and may be missing.
        state: memory before the first token, None as in `hksa`.
        inject: makes the injection of a segment, `inject` of `hksa`, from the segment's tokens and the memory with
            which it begins.
        return_state: as in `hksa`, of the last segment.

    Returns:
        o [B, T, H, d], and the memories at the ends of the segments; without return_state that of the last one may be
        missing.

    Raises:
        ValueError: as in `hksa`, or a gate without the memories of the layer below.
    """
    named = {
        "q": q, "k": k, "u_k": u_k, "u_v": u_v, "beta": beta, "write_idx": write_idx, "write_w": write_w,
        "read_idx": read_idx, "read_w": read_w, "gamma": gamma,
    }  # fmt: skip
    check_arguments(named, num_slots, state, doc_start, surprise, None)
    if segment_len < 1:
        raise ValueError(f"hksa_threaded: segment_len={segment_len}, expected at least 1")
    doc_start = wide_indices(doc_start)
    batch, length, heads, dim = q.shape
    segments, whole = -(-length // segment_len), length // segment_len
    if gate is not None:
        _check_gate(gate, below, segments - 1, (batch, heads, num_slots, dim), state_dtype(q))
    options: dict[str, Any] = {"num_slots": num_slots, "surprise": surprise, "backend": backend}
    at_once = (
        whole > 1
        and surprise is not None
        and inject is None
        and num_slots <= MOST_BUCKETS
        and segment_len * max(2 * write_idx.shape[-1], heads * k.shape[3]) * dim <= MAX_OFFSET
        and fits_triton(named)
        and not isinstance(state, SparseSlotState)
        and choose_backend("hksa_threaded", backend, q, ("reference", "torch", "triton")) == "triton"
    )
    if not at_once:
        o, states = _one_by_one(
            named, 0, segment_len, gate, below, state, doc_start, inject, return_state=return_state, **options
        )
        return o, SegmentEnds(states)
    from slotmamba_kernels.threading.threaded_op import threaded_triton

    assert surprise is not None
    fused = _tokens(named, slice(0, whole * segment_len))
    o, ends = threaded_triton(
        fused, num_slots=num_slots, segment_len=segment_len, surprise=surprise, gate=gate,
        below=None if gate is None or below is None else below.stacked(whole),
        state=state, doc_start=None if doc_start is None else doc_start[:, : whole * segment_len],
    )  # fmt: skip
    if whole == segments:
        return o, SegmentEnds(stacked=ends)
    memory = SegmentEnds(stacked=ends)[-1]
    rest, last = _one_by_one(
        named, whole, segment_len, gate, below, memory, doc_start, None, return_state=return_state, **options
    )
    return torch.cat([o, rest], 1), SegmentEnds(last, stacked=ends)


def _check_gate(
    gate: Gate, below: SegmentEnds | None, least: int, sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """sizes: B, H, M, d of every memory of the layer below, of which there are at least so many."""
    for name, x in zip(("bias", "slope"), gate, strict=True):
        if tuple(x.shape) != sizes[1:2]:
            raise ValueError(f"hksa_threaded: {name} of the gate has shape {tuple(x.shape)}, expected {sizes[1:2]}")
    if below is None or len(below) < least:
        raise ValueError(
            f"hksa_threaded: a gate needs the memories of the layer below at the ends of {least} segments, "
            f"there are {0 if below is None else len(below)}"
        )
    for found, dtypes in below.kinds():
        if found != sizes or dtypes != {dtype}:
            names = ", ".join(sorted(map(str, dtypes)))
            raise ValueError(
                f"hksa_threaded: below has a memory of B, H, M, d = {found} in {names}, expected {sizes} in {dtype}"
            )


def _one_by_one(
    named: dict[str, Tensor],
    first: int,
    segment_len: int,
    gate: Gate | None,
    below: SegmentEnds | None,
    memory: SlotState | None,
    doc_start: Tensor | None,
    inject: InjectSegment | None,
    *,
    return_state: bool,
    **options: Any,
) -> tuple[Tensor, list[SlotState]]:
    """Segments from number `first` on; memory: at the end of the one before."""
    length = named["q"].shape[1]
    outputs: list[Tensor] = []
    ends: list[SlotState] = []
    for number, start in enumerate(range(first * segment_len, length, segment_len), first):
        if gate is not None and memory is not None and number > 0:
            assert below is not None
            memory = thread_slots(memory, below[number - 1], *gate, backend=_mixing(options["backend"]))
        span = slice(start, min(start + segment_len, length))
        inputs: dict[str, Any] = _tokens(named, span)
        o, memory = hksa(
            **inputs,
            state=memory,
            doc_start=documents_of(doc_start, span),
            inject=None if inject is None else inject(span, memory),
            return_state=return_state or span.stop < length,
            **options,
        )
        outputs.append(o)
        if memory is not None:
            ends.append(memory)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), ends


def _tokens(named: dict[str, Tensor], span: slice) -> dict[str, Tensor]:
    return {name: x if name == "gamma" else x[:, span] for name, x in named.items()}


def _mixing(backend: str) -> str:
    return "torch" if backend == "reference" else backend
