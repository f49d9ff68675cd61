"""One process that holds all."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from slotmamba.checkpoint import TensorContents, state
from slotmamba.config.schema import Recipe
from slotmamba.device import compute_precision
from slotmamba.engines.dtypes import assert_float32
from slotmamba.engines.engine import Engine
from slotmamba.models import SlotMamba, build_model
from slotmamba.models.initial import InitialWeights
from slotmamba.models.slotmamba import TokenLosses
from slotmamba.optim import build_optimizer, decayed_parameters, gradient_norm, scale_gradients
from slotmamba.world import World


class SingleEngine(Engine):
    engine: Literal["single", "fsdp2"] = "single"
    """Its name in recipes and checkpoints."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.recipe = recipe
        self.world = world
        torch.manual_seed(recipe.seed)
        self.model, decayed = self._prepare(recipe, world)
        self.optimizer = build_optimizer(self.model, recipe.optim, decayed)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self._checked = False

    def _prepare(self, recipe: Recipe, world: World) -> tuple[SlotMamba, set[str]]:
        """The model with its initial weights, and the names of the parameters that have weight decay."""
        model = build_model(recipe.model)
        InitialWeights(model, recipe.seed).fill(model)
        return model.to(world.device), decayed_parameters(model)

    def losses(self, **arguments: Tensor) -> TokenLosses:
        with compute_precision(self.world.device, self.recipe.train.precision):
            return self.model.losses(**arguments)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def gradient_norm(self) -> Tensor:
        return gradient_norm(self.model.parameters())

    def step(self, lr: float, norm: Tensor) -> None:
        # What the rows do not use, such as surprise where a row is one segment, has a gradient of zero, so that its
        # optimizer state is there from the first step too.
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if not self._checked:
            self._check_gradients()
        scale_gradients(self.model.parameters(), norm, self.recipe.optim.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.discard()
        if not self._checked:
            assert_float32("optimizer states", state.optimizer_tensors(self.model, self.optimizer))
            self._checked = True

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def contents(self) -> TensorContents:
        return TensorContents(self.model, self.optimizer, self.engine)

    def tensors(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        tensors = state.model_tensors(self.model) | state.optimizer_tensors(self.model, self.optimizer)
        return tensors if names is None else {name: tensors[name] for name in names}

    def _check_gradients(self) -> None:
        parameters = dict(self.model.named_parameters())
        assert_float32("parameters", parameters)
        assert_float32("gradients", {name: parameter.grad for name, parameter in parameters.items()})
