"""What a run ran on, for environment.json. Never the environment variables: they hold secrets."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from slotmamba.dependencies import dependencies
from slotmamba.installed import PACKAGE, checkout_root


def describe_environment() -> dict[str, Any]:
    """Versions, source commit, host, CPU and GPUs of this process, ready for JSON.

    ``git`` is None unless slotmamba runs from a git checkout; ``memory`` of a GPU is in bytes.
    """
    import torch

    return {
        "slotmamba": metadata.version("slotmamba"),
        "git": git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
        "cpu": {"model": cpu_model(), "cores": os.cpu_count(), "usable_cores": usable_cores()},
        "torch": {
            "threads": torch.get_num_threads(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "gpus": describe_gpus(),
        "packages": {each.name: each.installed for each in dependencies() if each.installed is not None},
    }


def describe_gpus() -> list[dict[str, Any]]:
    """Name, memory in bytes and compute capability of every visible GPU."""
    import torch

    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "memory": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"} for gpu in properties
    ]


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that slotmamba runs from, or was copied from for a job, and whether tracked files differ
    from it; None for an installed package."""
    root = checkout_root()
    if root is None:
        copied = PACKAGE / "git.json"  # written by `slotmamba submit`
        return json.loads(copied.read_text()) if copied.exists() else None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git here, or a checkout that it will not read
        return None
    return {"commit": described.removesuffix("-dirty"), "dirty": described.endswith("-dirty")}


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on, which a container or a scheduler may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
