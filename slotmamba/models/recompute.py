"""What the backward pass computes again instead of keeping, and the chunks of the sequence that it does so by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from slotmamba.config.schema import Checkpointing, ModelConfig

R = TypeVar("R")

# What `selective` keeps of a layer: the names of linear layers and attention beneath autograd, on CPU and GPU.
# Batched products (bmm) are not among them: they are the slot memory's reads and the scan of Mamba-2.
_aten = torch.ops.aten
KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


def run_layer(mode: Checkpointing, function: Callable[..., R], *args: Any) -> R:
    """Runs (a part of) a layer. Where gradients are wanted, its intermediate results are kept as the mode says.

    To be called within the forward of the layer's module, not around it: FSDP2 and ZeRO-3 gather a module's weights for
    its backward pass, in which the recomputation falls, and would gather them again for a module called anew.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return function(*args)
    selective = partial(create_selective_checkpoint_contexts, KEPT)
    result: R = checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # layers draw no random numbers
        context_fn=selective if mode == "selective" else noop_context_fn,
    )
    return result


def chunked(config: ModelConfig, length: int, count: int) -> list[list[slice]]:
    """Cuts a sequence into `count` chunks, about equally long, and each chunk into its segments of the slot memory.

    Where memory is handed over between segments, chunks are whole segments, in which the last may be shorter; elsewhere
    a chunk is one segment.

    Raises ValueError for more chunks than there are segments (tokens).
    """
    size = config.slots.segment_len if config.segmented else 1
    units = -(-length // size)
    if count > units:
        what = f"segments of {size} tokens" if config.segmented else "tokens"
        raise ValueError(f"sequence_chunks={count}, but a sequence of {length} tokens has only {units} {what}")
    bounds = [min(units * number // count * size, length) for number in range(count + 1)]
    bounds[-1] = length
    return [
        [slice(at, min(at + size, stop)) for at in range(start, stop, size)]
        if config.segmented
        else [slice(start, stop)]
        for start, stop in pairwise(bounds)
    ]
