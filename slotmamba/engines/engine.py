"""The interface of the engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

import torch
from torch import Tensor

from slotmamba.checkpoint.contents import Contents
from slotmamba.models import SlotMamba
from slotmamba.models.slotmamba import TokenLosses
from slotmamba.world import World


class Engine(ABC):
    """Holds model and optimizer, spread over the processes of a world, and makes optimizer steps.

    One step is: `losses` and `backward` for each micro-batch, `gradient_norm`, then `step` or `discard`. Every process
    makes the same calls, with micro-batches of its own. Parameters, gradients and optimizer states are float32;
    `losses` computes in the recipe's train.precision. Gradients are summed over micro-batches and processes, in
    float32: the caller divides the loss by the count of the whole global batch.
    """

    world: World
    model: SlotMamba
    """The bare model: for names, validation and generation; its parameters are shards under fsdp2 and ZeRO-3."""
    optimizer: torch.optim.Optimizer
    parameters: int
    """Numbers of the whole model's parameters."""

    @abstractmethod
    def losses(self, **arguments: Tensor) -> TokenLosses:
        """The forward pass of a micro-batch, in the recipe's precision; arguments as for the model's `losses`."""

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of `loss`, a scalar; after the step's `last` micro-batch they are summed over the
        processes."""

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """Euclidean norm of the whole model's gradient, a scalar, the same in every process; after the last backward.

        Not finite where any gradient is not.
        """

    @abstractmethod
    def step(self, lr: float, norm: Tensor) -> None:
        """Clips the gradients, whose `gradient_norm` is `norm`, to the recipe's clip_norm, updates the weights and
        drops the gradients."""

    @abstractmethod
    def discard(self) -> None:
        """Drops the gradients of a step that is skipped; weights and optimizer states stay as they are."""

    @abstractmethod
    def tensors(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Weights and optimizer states by the names of `checkpoint.state`: ``model.NAME``, ``optimizer.NAME.KEY``.

        They share memory with the engine's own (single), are DTensors that do (fsdp2), or are gathered copies
        (deepspeed, where this is a collective: there, ask for the ones that are needed).

        Args:
            names: the ones to return, None for all.
        """

    @abstractmethod
    def contents(self) -> Contents:
        """What a checkpoint of this engine holds, for `CheckpointStore` to save or to restore."""
