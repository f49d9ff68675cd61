"""The commands of docs/slurm.md's tutorial, as they stand there, in one shell, in an empty folder.

Only the run is made short: `submit` is given fewer and smaller steps.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slotmamba_slurm.cluster import missing_for_a_cluster
from slotmamba_slurm.cluster.cluster import outside_jobs

ROOT = Path(__file__).resolve().parents[2]
SHORT = "train.steps=100 train.global_batch_tokens=512 train.log_every=10 train.eval_every=1000 train.eval_rows=2"
SHELL = f"""\
set -eo pipefail
slotmamba() {{
    if [ "$1" = submit ]; then command slotmamba "$@" {SHORT}; else command slotmamba "$@"; fi
}}
trap 'python -m slotmamba_slurm.cluster down 2>/dev/null || true' EXIT
"""
MISSING = missing_for_a_cluster()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(MISSING is not None, reason=f"no Slurm: {MISSING}")
def test_tutorial(tmp_path: Path) -> None:
    tutorial = re.search(r"^## Tutorial.*?(?=^## )", (ROOT / "docs" / "slurm.md").read_text(), re.MULTILINE | re.DOTALL)
    assert tutorial
    commands = re.findall(r"^```bash\n(.*?)^```$", tutorial[0], re.MULTILINE | re.DOTALL)
    assert len(commands) == 5
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", SHELL + "".join(commands)],
        cwd=tmp_path,
        env=outside_jobs(os.environ) | {"PATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=380,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "parallel.engine=fsdp2 parallel.replicate=2 train.micro_batch=2 (to fill 2 nodes)\n" in done.stdout
    saved = re.search(r"SIGTERM: saved at step (\d+) of 100", done.stdout)
    assert saved and f"mqar-tiny: resumes after step {saved[1]} " in done.stdout, done.stdout[-5000:]
    assert "mqar-tiny: finished 100 steps" in done.stdout
    shown = done.stdout[done.stdout.rindex("mqar-tiny: finished 100 steps") :]
    assert "preempted" in shown, shown
