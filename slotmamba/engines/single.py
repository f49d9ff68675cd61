"""One process that holds all."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from slotmamba.checkpoint import state
from slotmamba.config.schema import Recipe
from slotmamba.device import compute_precision
from slotmamba.engines.engine import Engine
from slotmamba.models import build_model
from slotmamba.models.slotmamba import TokenLosses
from slotmamba.optim import build_optimizer, gradient_norm, scale_gradients
from slotmamba.world import World


class SingleEngine(Engine):
    def __init__(self, recipe: Recipe, world: World) -> None:
        self.recipe = recipe
        self.world = world
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe.model).to(world.device)
        self.optimizer = build_optimizer(self.model, recipe.optim)

    def losses(self, **arguments: Tensor) -> TokenLosses:
        with compute_precision(self.world.device, self.recipe.train.precision):
            return self.model.losses(**arguments)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def gradient_norm(self) -> Tensor:
        return gradient_norm(self.model.parameters())

    def step(self, lr: float, norm: Tensor) -> None:
        scale_gradients(self.model.parameters(), norm, self.recipe.optim.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        tensors = state.model_tensors(self.model) | state.optimizer_tensors(self.model, self.optimizer)
        return tensors if names is None else {name: tensors[name] for name in names}
