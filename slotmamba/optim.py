"""The optimizer, its parameter groups, and the gradient norm."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from slotmamba.config.schema import OptimConfig


def build_optimizer(model: nn.Module, optim: OptimConfig, decayed: Collection[str] | None = None) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) with the groups ``decay`` and ``no_decay``.

    A tied parameter appears once, a frozen one not at all, and a group without parameters is left out;
    ``group["name"]`` tells the groups apart. The learning rate starts at ``optim.lr``; the caller sets ``group["lr"]``
    before each step.

    Args:
        decayed: names of the parameters with weight decay, for a model whose parameters have become shards, without
            their attributes and perhaps their shapes; None asks the model itself.
    """
    decayed = decayed_parameters(model) if decayed is None else decayed
    # `named_parameters()` yields a tied parameter once.
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    trainable = [parameter for _, parameter in named]
    decay = [parameter for name, parameter in named if name in decayed]
    no_decay = [parameter for name, parameter in named if name not in decayed]
    groups = [
        {"name": "decay", "params": decay, "weight_decay": optim.weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]
    # CPU and CUDA, the devices that we run on, both have the fused kernel.
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
    )
    placed = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(placed) == sorted(map(id, trainable)), "every trainable parameter belongs to exactly one group"
    return optimizer


def decayed_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters with weight decay: all but those with fewer than two axes (norms, biases, temperatures)
    and those with the attribute ``no_weight_decay = True`` (gates and the like that are matrices by shape only)."""
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and not getattr(parameter, "no_weight_decay", False)
    }


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, a scalar on their device; 0 where there is none.

    A gradient that is not finite makes the norm not finite: that is the test before `scale_gradients` and the step.
    """
    return nn.utils.get_total_norm(parameter.grad for parameter in parameters if parameter.grad is not None)


def scale_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients by ``min(1, max_norm / norm)`` with their `gradient_norm`; ``max_norm = 0`` does nothing."""
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
