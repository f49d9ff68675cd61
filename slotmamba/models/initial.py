"""Initial weights, keyed by parameter name: the same under every mesh, engine and order of construction."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

Rule = Callable[[Tensor, torch.Generator | None], object]
"""Fills a tensor in place, drawing from the generator (None: torch's own)."""

# Torch types the parameters of its modules as tensors.
Parameter = TypeVar("Parameter", bound=Tensor)

_deferred = False


def starts(parameter: Parameter, rule: Rule) -> Parameter:
    """Says what a parameter starts as, and fills it. Modules call it while they are built.

    A later rule replaces an earlier one, so that a module may have its own start for a parameter of a module in it.
    """
    parameter.initial_rule = rule  # type: ignore[attr-defined]
    if not (_deferred or parameter.is_meta):
        with torch.no_grad():
            rule(parameter, None)
    return parameter


def starts_like(parameter: Tensor, other: Tensor) -> None:
    """Says that a parameter starts with the values of another one of its model."""
    parameter.initial_twin = other  # type: ignore[attr-defined]
    if not (_deferred or parameter.is_meta):
        with torch.no_grad():
            parameter.copy_(other)


@contextmanager
def deferred() -> Iterator[None]:
    """Modules built in here do not fill their parameters: those are shards, and get their values later."""
    global _deferred
    before, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = before


def constant(value: float) -> Rule:
    return lambda tensor, generator: tensor.fill_(value)


def normal(std: float) -> Rule:
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


class InitialWeights:
    """The initial weights of a model, parameter by parameter.

    The values of a parameter come from a generator that is seeded by (seed, fully qualified name), on the CPU, so
    whoever holds a part of it can make exactly that part. A tied parameter has one name, the first.
    """

    def __init__(self, skeleton: nn.Module, seed: int) -> None:
        """
        Args:
            skeleton: the model; it may be on the meta device, and is not changed.
            seed: the recipe's.
        """
        self._seed = seed
        self._parameters = dict(skeleton.named_parameters())
        self._modules = dict(skeleton.named_modules())
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        assert not any(True for _ in skeleton.buffers()), "buffers would need values too"

    @property
    def numel(self) -> int:
        """Numbers of all parameters together."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    def values(self, name: str) -> Tensor:
        """The whole parameter, float32 on the CPU."""
        twin = getattr(self._parameters[name], "initial_twin", None)
        if twin is not None:
            return self.values(self._names[id(twin)])
        key = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        values = torch.empty(self._parameters[name].shape)
        self._rule(name)(values, generator)
        return values

    def fill(self, model: nn.Module) -> None:
        """Gives a model that is whole in this process its initial weights."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.values(name))

    def _rule(self, name: str) -> Rule:
        parameter = self._parameters[name]
        rule: Rule | None = getattr(parameter, "initial_rule", None)
        if rule is not None:
            return rule
        module = self._modules[name.rpartition(".")[0]]
        if isinstance(module, nn.RMSNorm):
            return constant(1.0)
        assert isinstance(module, nn.Linear | nn.Conv1d), f"nothing says what {name} starts as"
        # What torch's own layers start as: Kaiming's uniform with a = sqrt(5), which is this bound.
        bound = 1 / math.sqrt(module.weight[0].numel())
        return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)
