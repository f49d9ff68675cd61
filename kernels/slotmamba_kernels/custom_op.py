"""How the kernels' ops are made known to torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad


def custom_op(name: str, *, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., object]], Any]:
    """`torch.library.custom_op` without forward-mode derivatives: within `torch.func.jvp`, `jacfwd` or a dual level of
    `torch.autograd.forward_ad` the op raises NotImplementedError, as an autograd.Function without jvp does.

    torch itself would go on without tangents, as if the op were constant. The op does not see whether its inputs have
    any (`torch.func` keeps them elsewhere), so it raises in any case.
    """

    def define(function: Callable[..., object]) -> Any:
        @functools.wraps(function)
        def checked(*arguments: Any) -> object:
            if forward_ad._current_level >= 0:
                raise NotImplementedError(f"{name} has no forward-mode derivative (jvp)")
            return function(*arguments)

        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        return torch.library.custom_op(name, checked, mutates_args=mutates_args, schema=schema)

    return define
