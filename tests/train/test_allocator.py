from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from slotmamba.allocator import keep_freed_memory

RESIDENT = """
import torch
from slotmamba.allocator import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

torch.ones(1)
if {keep}:
    keep_freed_memory()
before = resident()
ones = [torch.ones(2**20) for _ in range(16)]  # 4 MiB each
assert resident() - before > 60 * 2**20
del ones
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_stays(keep: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT.format(keep=keep)], capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) > 60 * 2**20) == keep


class OlderGlibc:
    """Refuses a threshold of more than 32 MiB (M_MMAP_THRESHOLD is -3), as older versions do."""

    def __init__(self, name: str) -> None:
        settings.clear()

    def mallopt(self, option: int, value: int) -> int:
        if option == -3 and value > 1 << 25:
            return 0
        settings[option] = value
        return 1


settings: dict[int, int] = {}


def test_older_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", OlderGlibc)
    keep_freed_memory()
    assert settings == {-3: 1 << 25, -1: (1 << 31) - 1}


def test_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", OlderGlibc)
    settings.clear()
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    keep_freed_memory()
    assert settings == {}
