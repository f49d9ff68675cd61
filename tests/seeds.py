"""Fresh random numbers that can be had again."""

from __future__ import annotations

import os
import secrets

import torch


def seed_afresh() -> int:
    """Seeds torch with a number that is new in every run, and returns it.

    It is printed, and pytest shows what a failed test printed: TEST_SEED=<number> runs the same test with it again.
    """
    seed = int(os.environ.get("TEST_SEED") or secrets.randbits(32))
    print(f"TEST_SEED={seed}")
    torch.manual_seed(seed)
    return seed
