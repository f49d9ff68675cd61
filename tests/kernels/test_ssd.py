"""SSD: the chunked form against the definition, and the choice of backends."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slotmamba_kernels.ssd import ssd
from slotmamba_kernels.ssd.mamba import mamba_installed


def _inputs(
    batch: int = 2,
    length: int = 20,
    heads: int = 4,
    dim: int = 3,
    groups: int = 2,
    size: int = 5,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> dict[str, Any]:
    """Random arguments, tensors only; Any, because they are passed on with ** beside others."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype)

    tensors = {
        "x": normal(batch, length, heads, dim),
        "dt": torch.nn.functional.softplus(normal(batch, length, heads)),
        "A": -normal(heads).exp(),
        "B": normal(batch, length, groups, size),
        "C": normal(batch, length, groups, size),
        "D": normal(heads),
        "initial_state": normal(batch, heads, dim, size),
    }
    return {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}


def _outputs_and_gradients(inputs: dict[str, Any], backend: str, chunk_size: int = 64) -> list[Tensor]:
    y, state = ssd(**inputs, chunk_size=chunk_size, backend=backend)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in (y, state)]
    return [y, state, *torch.autograd.grad((y, state), list(inputs.values()), weights)]


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("length", [1, 7, 16, 37])
@pytest.mark.parametrize("chunk_size", [1, 8, 64])
def test_torch_equals_reference_in_float64(heads: int, groups: int, length: int, chunk_size: int) -> None:
    torch.manual_seed(length)
    inputs = _inputs(length=length, heads=heads, groups=groups)
    expected = _outputs_and_gradients(inputs, "reference")
    for got, want in zip(_outputs_and_gradients(inputs, "torch", chunk_size), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_reference_is_the_equation() -> None:
    inputs = _inputs(batch=1, length=2, heads=2, groups=1)
    x, dt, A, B, C, D, h = inputs.values()
    y = torch.zeros_like(x)
    h = h.clone()
    for t in range(2):
        for head in range(2):
            written = dt[0, t, head] * torch.outer(x[0, t, head], B[0, t, 0])
            h[0, head] = torch.exp(dt[0, t, head] * A[head]) * h[0, head] + written
            y[0, t, head] = h[0, head] @ C[0, t, 0] + D[head] * x[0, t, head]
    got_y, got_h = ssd(**inputs, backend="reference")
    torch.testing.assert_close(got_y, y, rtol=0, atol=1e-12)
    torch.testing.assert_close(got_h, h, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_without_skip_and_entering_state(backend: str) -> None:
    inputs = _inputs()
    y, state = ssd(**{name: inputs[name] for name in ("x", "dt", "A", "B", "C")}, backend=backend)
    zeros = {"D": torch.zeros_like(inputs["D"]), "initial_state": torch.zeros_like(inputs["initial_state"])}
    torch.testing.assert_close((y, state), ssd(**{**inputs, **zeros}, backend=backend), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_state_carried_over_a_split(backend: str) -> None:
    inputs = _inputs(length=21)
    per_token = {name: inputs[name] for name in ("x", "dt", "B", "C")}
    fixed: dict[str, Any] = {"A": inputs["A"], "D": inputs["D"], "chunk_size": 8, "backend": backend}
    whole, leaving = ssd(**inputs, chunk_size=8, backend=backend)
    first, state = ssd(
        **{name: x[:, :9] for name, x in per_token.items()}, initial_state=inputs["initial_state"], **fixed
    )
    second, end = ssd(**{name: x[:, 9:] for name, x in per_token.items()}, initial_state=state, **fixed)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(end, leaving, rtol=0, atol=1e-12)


def test_strong_decay_stays_exact_and_finite() -> None:
    """A sum over a quiet stretch behind an enormous decay keeps its digits, in float32."""
    inputs = _inputs(length=64, dtype=torch.float32)
    with torch.no_grad():
        inputs["A"].fill_(-16.0)
        inputs["dt"].fill_(1e-3)
        inputs["dt"][:, 5] = 1e4
        inputs["x"][:, 5] = 0.0
    exact = _outputs_and_gradients(
        {name: x.detach().double().requires_grad_() for name, x in inputs.items()}, "reference"
    )
    for got, want in zip(_outputs_and_gradients(inputs, "torch"), exact, strict=True):
        # float32 sums of up to 64 terms: a few 1e-6 of the largest entry.
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * float(want.detach().abs().max()))


def test_future_does_not_change_the_past() -> None:
    inputs = {name: x.detach() for name, x in _inputs(length=50, dtype=torch.float32).items()}
    before, _ = ssd(**inputs, chunk_size=16)
    for name in ("x", "dt", "B", "C"):
        inputs[name][:, 30:] += 1
    after, _ = ssd(**inputs, chunk_size=16)
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30:], after[:, 30:])


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    inputs = _inputs(dtype=torch.float32)
    low = {name: x.detach().bfloat16() if name in ("x", "B", "C") else x for name, x in inputs.items()}
    y, state = ssd(**low)
    exact, leaving = ssd(**{name: x.float() for name, x in low.items()})
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(y, exact.bfloat16()) and torch.equal(state, leaving)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 20, 4)}, "x has shape"),
        ({"x": torch.zeros(2, 0, 4, 3)}, "x has shape"),
        ({"x": torch.zeros(2, 20, 4, 3, dtype=torch.long)}, "x is torch.int64"),
        ({"dt": torch.zeros(2, 20)}, "dt has shape"),
        ({"A": torch.zeros(3)}, "A has shape"),
        ({"B": torch.zeros(2, 20, 3, 5)}, "B has shape"),
        ({"C": torch.zeros(2, 20, 2, 4)}, "C has shape"),
        ({"D": torch.zeros(4, 3)}, "D has shape"),
        ({"initial_state": torch.zeros(2, 4, 5, 3)}, "initial_state has shape"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssd(**{**_inputs(), **change})


@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is not None, reason="mamba-ssm is installed")
def test_mamba_ssm_missing_says_how_to_install_it() -> None:
    with pytest.raises(ValueError, match=r"slotmamba\[gpu\].*mamba-ssm"):
        ssd(**_inputs(dtype=torch.float32), backend="mamba_ssm")


def _fake_mamba_ssm(folder: Path, imports: str) -> None:
    """A package with mamba-ssm's folders, whose own code first imports a half of itself, then `imports`."""
    (folder / "mamba_ssm/ops/triton").mkdir(parents=True)
    (folder / "mamba_ssm/__init__.py").write_text(f"import mamba_ssm.ops\nimport {imports}\nloaded = True\n")
    (folder / "mamba_ssm/ops/__init__.py").touch()
    (folder / "mamba_ssm/ops/triton/__init__.py").touch()
    (folder / "mamba_ssm/ops/triton/ssd_combined.py").write_text("def mamba_chunk_scan_combined(): pass\n")


def _python(code: str, folder: Path) -> str:
    """Runs code in a fresh interpreter that sees the packages in folder before any others; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout + done.stderr


def test_mamba_ssm_built_without_its_cuda_scan_is_loaded(tmp_path: Path) -> None:
    _fake_mamba_ssm(tmp_path, imports="selective_scan_cuda")
    printed = _python(
        "import sys\n"
        "from slotmamba_kernels.ssd.mamba import mamba_installed\n"
        "print(mamba_installed(), 'selective_scan_cuda' in sys.modules)\n"
        "import mamba_ssm\n"
        "print(mamba_ssm.loaded)",
        tmp_path,
    )
    assert printed.split() == ["True", "False", "True"]


def test_mamba_ssm_that_does_not_import_is_reported(tmp_path: Path) -> None:
    _fake_mamba_ssm(tmp_path, imports="a_package_that_is_missing")
    printed = _python("from slotmamba_kernels.ssd.mamba import mamba_installed; print(mamba_installed())", tmp_path)
    assert "False" in printed and "does not import" in printed and "a_package_that_is_missing" in printed


@pytest.mark.skipif(not torch.cuda.is_available() or not mamba_installed(), reason="needs CUDA and mamba-ssm")
@pytest.mark.parametrize("length", [1, 100, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mamba_ssm_equals_reference(length: int, dtype: torch.dtype) -> None:
    torch.manual_seed(length)
    inputs = _inputs(length=length, heads=4, dim=32, groups=2, size=64, dtype=torch.float32, device="cuda")
    inputs = {
        name: x.detach().to(dtype if name in ("x", "B", "C") else x.dtype).requires_grad_()
        for name, x in inputs.items()
    }
    exact = _outputs_and_gradients(
        {name: x.detach().double().requires_grad_() for name, x in inputs.items()}, "reference"
    )
    # The kernels multiply float32 matrices in TF32 (10 bits) and bfloat16 ones in bfloat16 (7 bits).
    tolerance = 4e-3 if dtype == torch.float32 else 2e-2
    for got, want in zip(_outputs_and_gradients(inputs, "mamba_ssm"), exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * float(want.detach().abs().max()))
