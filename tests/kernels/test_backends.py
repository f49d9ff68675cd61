"""Which backend is picked, and what is said where the one asked for cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from slotmamba_kernels import backends
from slotmamba_kernels.backends import choose_backend
from slotmamba_kernels.hksa import launch
from tests.kernels.hksa_grid import device_case
from tests.seeds import seed_afresh

AVAILABLE = ("reference", "torch", "triton")


def tensor_on_gpu(dtype: torch.dtype) -> Any:
    """What `choose_backend` looks at in a tensor."""
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_is_triton_on_a_checked_gpu(dtype: torch.dtype, hopper: None) -> None:
    assert choose_backend("op", "auto", tensor_on_gpu(dtype), AVAILABLE) == "triton"


def test_auto_is_torch_elsewhere(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, for float64, for an op without Triton kernels, without Triton, and on a GPU that nobody checked."""
    float32 = tensor_on_gpu(torch.float32)
    assert choose_backend("op", "auto", torch.zeros(1), AVAILABLE) == "torch"
    assert choose_backend("op", "auto", tensor_on_gpu(torch.float64), AVAILABLE) == "torch"
    assert choose_backend("op", "auto", float32, ("reference", "torch")) == "torch"
    with monkeypatch.context() as patch:
        patch.setattr(backends, "TRITON_INSTALLED", False)
        assert choose_backend("op", "auto", float32, AVAILABLE) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_backend("op", "auto", float32, AVAILABLE) == "torch"


@pytest.mark.parametrize("backend", AVAILABLE)
def test_a_name_is_what_is_used(backend: str) -> None:
    assert choose_backend("op", backend, tensor_on_gpu(torch.float32), AVAILABLE) == backend


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^op: unknown backend 'cuda', expected one of auto, reference, torch, triton$"
    ):
        choose_backend("op", "cuda", torch.zeros(1), AVAILABLE)
    with pytest.raises(ValueError, match=r"^op: unknown backend 'triton', expected one of auto, torch$"):
        choose_backend("op", "triton", tensor_on_gpu(torch.float32), ("torch",))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64])
def test_triton_refuses_types_that_it_has_no_kernels_for(dtype: torch.dtype) -> None:
    with pytest.raises(
        ValueError, match=rf"^op: backend 'triton' takes float32, bfloat16 or float16, not {dtype}; use"
    ):
        choose_backend("op", "triton", tensor_on_gpu(dtype), AVAILABLE)


def test_triton_has_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TRITON_INSTALLED", False)
    with pytest.raises(ValueError, match=r"^op: backend 'triton' needs the package triton: pip install"):
        choose_backend("op", "triton", tensor_on_gpu(torch.float32), AVAILABLE)


def test_hksa_refuses_float64() -> None:
    case = device_case()
    with pytest.raises(
        ValueError, match=r"^hksa: backend 'triton' takes float32, bfloat16 or float16, not torch.float64"
    ):
        case.with_tensors(q=case.tensors["q"].double()).call("triton")


HKSA_ON_A_CPU = """
import torch
from slotmamba_kernels import hksa
x, index, weight = torch.ones(1, 1, 1, 32), torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 1, 1)
k = x.unsqueeze(3)
arguments = (x, k, k, k, weight, index, weight, index, weight, torch.ones(1))
hksa(*arguments, num_slots=1)
hksa(*arguments, num_slots=1, backend="triton")
"""


def test_triton_on_a_cpu_needs_the_interpreter() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", HKSA_ON_A_CPU], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("ValueError: hksa: backend 'triton' needs tensors on a GPU, these are on cpu; use 'torch'")


@triton.jit
def does_not_compile(x):  # type: ignore[no-untyped-def]
    tl.store(x, tl.this_is_not_there(x))


class DoesNotCompile:
    """Stands in for any kernel: launches `does_not_compile` on the first of its arguments."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **constants: does_not_compile[grid](arguments[0])


@pytest.mark.parametrize("kernel", ["chain_forward", "read_forward"])
def test_a_kernel_that_does_not_compile_is_an_error_with_the_reason(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed_afresh()
    monkeypatch.setattr(launch, kernel, DoesNotCompile())
    monkeypatch.setattr(backends, "_checked", lambda x: True)
    for backend in ("triton", "auto"):
        with pytest.raises(Exception, match="this_is_not_there"):
            device_case(length=1).call(backend)
