"""The task around a training process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slotmamba_slurm.task import _write_result
from tests.disks import mounted_disk
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


def test_a_result_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and no part of a file is left, which submitit would stumble over the next time."""
    with mounted_disk(tmp_path, "4k") as disk:
        (disk / "full").write_bytes(bytes(4096))
        _write_result(disk / "7_0_result.pkl", ("error", "training failed"))
        assert [path.name for path in disk.iterdir()] == ["full"]
    said = capsys.readouterr().out
    assert said == "how the job has ended is not written: [Errno 28] No space left on device\n"
    result = tmp_path / "7_0_result.pkl"
    result.with_name("7_0_result.pkl.save_tmp").touch()  # of a task that was killed
    _write_result(result, ("success", 0))
    assert [path.name for path in tmp_path.glob("*.pkl*")] == ["7_0_result.pkl"]
