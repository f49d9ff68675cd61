"""The precision policy, looked at rather than trusted: parameters, gradients and optimizer states are float32."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def assert_float32(what: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Asserts that each of the named tensors is there and float32.

    Args:
        what: what they are, for the message: "parameters", say.
    """
    found = {name: "missing" if tensor is None else str(tensor.dtype) for name, tensor in tensors.items()}
    wrong = [f"{name} is {dtype}" for name, dtype in found.items() if dtype != "torch.float32"]
    assert tensors, f"there are no {what}"
    assert not wrong, f"{what} must be torch.float32: {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}"
