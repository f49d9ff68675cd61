"""The task around a training process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.jobs import until

CHILD = """
import os, signal, sys
from slotmamba_slurm.task import Child
Child().run(["sh", "-c", "echo $$; exec sleep 600"], os.environ, signal.Signals[sys.argv[1]])
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("last", ["SIGKILL", "SIGTERM"])
def test_a_killed_task_takes_training_with_it(last: str) -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD, last], stdout=subprocess.PIPE, text=True) as task:
        assert task.stdout
        child = Path("/proc") / task.stdout.readline().strip()
        os.kill(task.pid, signal.SIGKILL)
    until(lambda: not child.exists() or ") Z " in (child / "stat").read_text())
