"""Types of HKSA's optional arguments, and the checks that all backends share."""

from __future__ import annotations

import torch
from torch import Tensor

from slotmamba_kernels.hksa.state import SlotState, SparseSlotState

Surprise = tuple[Tensor, Tensor]
"""(a_s [H], eta [H]), both in (0, 1)."""

Inject = tuple[Tensor, Tensor, Tensor, Tensor]
"""(c_k [B, T, H, K, d], c_v [B, T, H, K, d], lam_k [B, T, H, K], lam_v [B, T, H, K])."""

# The arguments that all other shapes follow from.
LAYOUTS = {"q": "B, T, H, d", "k": "B, T, H, n, d", "write_idx": "B, T, H, K", "read_idx": "B, T, H, K'"}


def _require(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"hksa: {name} has shape {tuple(tensor.shape)}, expected {shape}")


def _require_integers(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(f"hksa: {name} has dtype {tensor.dtype}, expected integers")


def _require_floats(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """like: of the same dtype, which kernels that load both as rows of one tile need."""
    if not tensor.is_floating_point():
        raise ValueError(f"hksa: {name} has dtype {tensor.dtype}, expected floating-point numbers")
    if like is not None and tensor.dtype != like.dtype:
        raise ValueError(f"hksa: {name} has dtype {tensor.dtype}, its counterpart of the other memory {like.dtype}")


def wide_indices(doc_start: Tensor | None) -> Tensor | None:
    """doc_start in a dtype that holds its differences."""
    return doc_start if doc_start is None or doc_start.dtype.itemsize >= 4 else doc_start.int()


def documents_of(doc_start: Tensor | None, span: slice) -> Tensor | None:
    """doc_start of a stretch of tokens, counted from its first."""
    return None if doc_start is None else doc_start[:, span] - span.start


def _has_values(x: Tensor) -> bool:
    """Whether looking at the values costs nothing: on a GPU it waits, and while torch.compile traces there are none."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _require_slots(name: str, index: Tensor, num_slots: int) -> None:
    """A slot that does not exist would be written into another head's memory."""
    _require_integers(name, index)
    if _has_values(index) and not 0 <= int(index.min()) <= int(index.max()) < num_slots:
        raise ValueError(
            f"hksa: {name} has slots from {int(index.min())} to {int(index.max())}, expected 0 to {num_slots - 1}"
        )


def _require_state(state: SlotState, shape: tuple[int, int, int, int]) -> None:
    """shape: B, H, M, d."""
    batch, heads, rows, dim = shape
    if isinstance(state, SparseSlotState):
        _require_list(state, shape)
        rows = state.slots.shape[-1]
    _require("state.S_k", state.S_k, (batch, heads, rows, dim))
    _require("state.S_v", state.S_v, (batch, heads, rows, dim))
    _require("state.z", state.z, (batch, heads, rows))
    _require("state.surprise", state.surprise, (batch, heads, rows))


def _require_list(state: SparseSlotState, shape: tuple[int, int, int, int]) -> None:
    batch, heads, num_slots, _ = shape
    slots = state.slots
    if state.slots_in_all != num_slots:
        raise ValueError(f"hksa: state is of {state.slots_in_all} slots a head, expected num_slots={num_slots}")
    if slots.ndim != 3 or tuple(slots.shape[:2]) != (batch, heads) or not slots.shape[2] or slots.dtype != torch.int32:
        raise ValueError(
            f"hksa: state.slots has shape {tuple(slots.shape)} and dtype {slots.dtype}, expected int32 "
            f"({batch}, {heads}, R), R at least 1"
        )
    if _has_values(slots):
        low, high = int(slots.min()), int(slots.max())
        filled = slots[..., 1:] == num_slots
        if not (0 <= low <= high <= num_slots and bool((filled | (slots[..., 1:] > slots[..., :-1])).all())):
            raise ValueError(
                "hksa: state.slots is not a list of distinct slots in ascending order, filled up with "
                f"num_slots={num_slots}: it goes from {low} to {high}"
            )


def check_arguments(
    named: dict[str, Tensor],
    num_slots: int,
    state: SlotState | None,
    doc_start: Tensor | None,
    surprise: Surprise | None,
    inject: Inject | None,
) -> None:
    """Raises ValueError unless the arguments are as hksa.md's table says, `named` holding the required ones."""
    for name, layout in LAYOUTS.items():
        shape = tuple(named[name].shape)
        if len(shape) != len(layout.split(", ")) or 0 in shape:
            raise ValueError(f"hksa: {name} has shape {shape}, expected [{layout}], each at least 1")
    batch, length, heads, dim = named["q"].shape
    steps, writes, reads = named["k"].shape[3], named["write_idx"].shape[3], named["read_idx"].shape[3]
    for name, count in (("write_idx", writes), ("read_idx", reads)):
        if count > num_slots:
            raise ValueError(f"hksa: {name} has {count} active slots a token, more than num_slots={num_slots}")
        _require_slots(name, named[name], num_slots)
    for name, tensor in named.items():
        if name not in ("write_idx", "read_idx"):
            _require_floats(name, tensor, named["u_k"] if name == "u_v" else None)
    for name in ("k", "u_k", "u_v"):
        _require(name, named[name], (batch, length, heads, steps, dim))
    _require("beta", named["beta"], (batch, length, heads, steps))
    for name, count in (("write_idx", writes), ("write_w", writes), ("read_idx", reads), ("read_w", reads)):
        _require(name, named[name], (batch, length, heads, count))
    _require("gamma", named["gamma"], (heads,))
    if state is not None:
        _require_state(state, (batch, heads, num_slots, dim))
    if doc_start is not None:
        _require("doc_start", doc_start, (batch, length))
        _require_integers("doc_start", doc_start)
    if surprise is not None:
        _require("surprise a_s", surprise[0], (heads,))
        _require("surprise eta", surprise[1], (heads,))
    if inject is not None:
        for name, tensor in zip(("c_k", "c_v"), inject[:2], strict=True):
            _require(f"inject {name}", tensor, (batch, length, heads, writes, dim))
        for name, tensor in zip(("lam_k", "lam_v"), inject[2:], strict=True):
            _require(f"inject {name}", tensor, (batch, length, heads, writes))
        for name, (keys, values) in {"c_v": inject[:2], "lam_v": inject[2:]}.items():
            _require_floats(f"inject {name}", values, like=keys)
