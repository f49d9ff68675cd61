"""What the backward pass computes again instead of keeping, and the chunks of the sequence that it does so by."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint, noop_context_fn

from slotmamba.config.schema import Checkpointing, ModelConfig

R = TypeVar("R")

# What `selective` keeps of a layer: the names of linear layers and attention beneath autograd, on CPU and GPU.
# Batched products (bmm) are not among them: they are the slot memory's reads and the scan of Mamba-2.
_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def run_layer(mode: Checkpointing, function: Callable[..., R], *args: Any) -> R:
    """Runs (a part of) a layer. Where gradients are wanted, its intermediate results are kept as the mode says.

    To be called within the forward of the layer's module, not around it: FSDP2 and ZeRO-3 gather a module's weights for
    its backward pass, in which the recomputation falls, and would gather them again for a module called anew.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return function(*args)
    result: R = checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # layers draw no random numbers
        context_fn=_keep_products if mode == "selective" else noop_context_fn,
    )
    return result


@dataclass
class _Product:
    """What one of the KEPT operations was, and its results (None: they have been overwritten)."""

    operation: tuple[Any, ...]
    results: Any


class _Keep(TorchDispatchMode):
    """Keeps the results of KEPT operations, in their order, unless they are overwritten: ZeRO-3's linear layers add
    their bias in place."""

    def __init__(self, kept: deque[_Product]) -> None:
        super().__init__()
        self.kept = kept
        self.by_storage: dict[int, _Product] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func in KEPT:
            # Not the tensors themselves: autograd will attach the graph to them, which in turn holds what is kept.
            product = _Product(_operation(func, args), tree_map_only(Tensor, Tensor.detach, results))
            self.kept.append(product)
            self.by_storage |= {_storage(each): product for each in tree_leaves(results) if isinstance(each, Tensor)}
        elif func._schema.is_mutable and args and isinstance(args[0], Tensor):
            overwritten = self.by_storage.pop(_storage(args[0]), None)
            if overwritten is not None:
                overwritten.results = None
        return results

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.by_storage.clear()


class _Reuse(TorchDispatchMode):
    """Takes the results of KEPT operations from there."""

    def __init__(self, kept: deque[_Product]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in KEPT:
            product = self.kept.popleft()
            assert product.operation == _operation(func, args), "the recomputation went another way"
            if product.results is not None:
                return product.results
        return func(*args, **(kwargs or {}))


def _keep_products() -> tuple[_Keep, _Reuse]:
    """What torch's `create_selective_checkpoint_contexts` does, and right under ZeRO-3 too: torch's does not see that
    results have been overwritten through the views that `matmul` returns, and gives wrong gradients without a word."""
    kept: deque[_Product] = deque()
    return _Keep(kept), _Reuse(kept)


def _operation(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return func, *(each.shape for each in args if isinstance(each, Tensor))


def _storage(x: Tensor) -> int:
    """Names the memory of a tensor, as long as it is kept."""
    return x.untyped_storage()._cdata


def chunked(config: ModelConfig, length: int, count: int) -> list[slice]:
    """Cuts a sequence into `count` chunks, about equally long.

    Where the slot memory has segments, chunks are whole ones, of which a sequence's last may be shorter.

    Raises ValueError for more chunks than there are segments (tokens).
    """
    most = config.most_chunks(length)
    if count > most:
        raise ValueError(f"sequence_chunks={count}, but a sequence of {length} tokens has at most {most}")
    size = config.slots.segment_len if config.segmented else 1
    bounds = [*(most * number // count * size for number in range(count)), length]
    return [slice(*span) for span in pairwise(bounds)]
