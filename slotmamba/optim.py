"""The optimizer, its parameter groups, and the gradient norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from slotmamba.config.schema import OptimConfig


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) with the groups ``decay`` and ``no_decay``.

    A parameter is in ``no_decay`` when it has fewer than two axes (norms, biases, temperatures) or carries the
    attribute ``no_weight_decay = True`` (gates and the like that are matrices by shape only). A tied parameter appears
    once, a frozen one not at all, and a group without parameters is left out; ``group["name"]`` tells the groups apart.
    The learning rate starts at ``optim.lr``; the caller sets ``group["lr"]`` before each step.
    """
    # `parameters()` yields a tied parameter once.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decay = [parameter for parameter in trainable if _has_weight_decay(parameter)]
    no_decay = [parameter for parameter in trainable if not _has_weight_decay(parameter)]
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


def _has_weight_decay(parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not getattr(parameter, "no_weight_decay", False)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, a scalar on their device; 0 where there is none.

    A gradient that is not finite makes the norm not finite: that is the test before `scale_gradients` and the step.
    """
    return nn.utils.get_total_norm(parameter.grad for parameter in parameters if parameter.grad is not None)


def scale_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients by ``min(1, max_norm / norm)`` with their `gradient_norm`; ``max_norm = 0`` does nothing."""
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
