"""Model and optimizer as tensors by name, and back.

The names are ``model.<name in the state dict>`` and ``optimizer.<parameter>.<state>``. A tied weight has one name, and
one optimizer state.

NOTE: torch's own get_state_dict is not used. Where an optimizer has not stepped yet it makes a step with zero gradients
first, which leaves the step counters at 1, and it cannot restore an optimizer in which only some parameters have a
state; both would change the run that follows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slotmamba.errors import InputError

_MODEL = "model."
_OPTIMIZER = "optimizer."


def aliases(model: nn.Module) -> dict[str, str]:
    """Tied weights: every further name of a parameter or buffer -> the first one, under which it is stored."""
    named = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    return {name: first[id(tensor)] for name, tensor in named if first.setdefault(id(tensor), name) != name}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights and persistent buffers; they share memory with the model's own."""
    tied = aliases(model)
    return {_MODEL + name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state of every parameter that has one; it shares memory with the optimizer's own."""
    states = {name: optimizer.state[each] for name, each in model.named_parameters() if each in optimizer.state}
    assert len(states) == len(optimizer.state), (
        "the optimizer holds the model's own parameters, and the model shows them"
    )
    return {f"{_OPTIMIZER}{name}.{key}": value for name, each in states.items() for key, value in each.items()}


def empty_optimizer_tensors(model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Uninitialised tensors for the optimizer states among the ``stored`` ones.

    What has the shape of its parameter is sharded as that is; all else is whole, on the CPU.
    """
    parameters = dict(model.named_parameters())
    empty = {}
    for name, tensor in stored.items():
        if name.startswith(_OPTIMIZER):
            parameter = parameters[_split(name)[0]].detach()
            alike = tensor.ndim > 0 and tensor.shape == parameter.shape
            empty[name] = torch.empty_like(
                parameter if alike else tensor, dtype=tensor.dtype, device=None if alike else "cpu"
            )
    return empty


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give the optimizer exactly the states in ``tensors``; its hyper-parameters stay as they are, the recipe's."""
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter_name, key = _split(name)
        states.setdefault(parameter_name, {})[key] = tensor
    # torch numbers the parameters through the groups.
    parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
    numbered: dict[int, dict[str, Any]] = {
        numbers[id(parameter)]: states[name] for name, parameter in model.named_parameters() if name in states
    }
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


def update_count(optimizer: torch.optim.Optimizer) -> int:
    """Updates that the optimizer has made, 0 before the first."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def check_model(here: Mapping[str, Tensor], stored: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Compare names, shapes and dtypes of the model's tensors ``here`` with the ``stored`` ones.

    Raises:
        InputError: they differ; the text names the first tensor that does.
    """
    there = {name: tensor for name, tensor in stored.items() if name.startswith(_MODEL)}
    for name in sorted(here.keys() | there.keys()):
        ours = _describe(here[name]) if name in here else "missing"
        theirs = _describe(there[name]) if name in there else "missing"
        if ours != theirs:
            raise InputError(f"{checkpoint} is of another model: {name} is {theirs} there and {ours} here")


def check_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, stored: Mapping[str, Tensor], checkpoint: Path
) -> None:
    """Check that every ``stored`` optimizer state is of a parameter that the optimizer has.

    Raises:
        InputError: one is not; the text names it.
    """
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in trained}
    for name in sorted(stored):
        if name.startswith(_OPTIMIZER) and _split(name)[0] not in names:
            raise InputError(f"{checkpoint} has {name}, but the optimizer here does not train that parameter")


def _split(name: str) -> tuple[str, str]:
    """Parameter and state of an optimizer tensor's name."""
    parameter, _, key = name.removeprefix(_OPTIMIZER).rpartition(".")
    return parameter, key


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
