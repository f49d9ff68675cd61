"""The benchmarks start, and count what they say they count. What they measure needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "kernels" / "benchmarks"


def run_python(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}:{BENCHMARKS}"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["hksa", "norm_loss", "slot_state"])
def test_help(name: str) -> None:
    assert "--json" in run_python(str(BENCHMARKS / f"{name}.py"), "--help")


def test_traffic_and_addresses() -> None:
    """Of the reference shape, 32,768 tokens of 8 heads: 6 passes, or 7 with recomputation, over tables of 8 times 256
    numbers of 2 bytes and z, 27 or 33 vectors of 256 bytes, and 16 indices and weights."""
    code = """
import torch, hksa
hksa.DEVICE = torch.device("cpu")
print(hksa.traffic(hksa.BASE), hksa.traffic(hksa.VARIANTS["HKSA, recompute"]))
for draw in (hksa.uniform_slots, hksa.zipf_slots):
    slots = draw(20_000, 4, 64)
    assert slots.dtype == torch.int32 and slots.shape == (20_000, 4) and 0 <= int(slots.min()) <= int(slots.max()) < 64
    assert all(len(set(row)) == 4 for row in slots[:2000].tolist())
    shares = slots.flatten().bincount(minlength=64) / 20_000
    print(float(shares.max()), float(shares.min()))
"""
    traffic, uniform, zipf = (tuple(map(float, line.split())) for line in run_python("-c", code).splitlines())
    addresses = 5 * 16 * 4
    assert traffic == tuple(
        262_144 * (passes * 8 * (512 + 4) + 256 * vectors + addresses) for passes, vectors in ((6, 27), (7, 33))
    )
    assert 0.05 < uniform[1] <= 1 / 16 <= uniform[0] < 0.08
    assert zipf[0] > 0.5 and zipf[1] < 0.03
