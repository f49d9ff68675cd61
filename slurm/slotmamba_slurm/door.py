"""A way out of containers for Slurm's commands, which are not in images.

``python -m slotmamba_slurm.door FOLDER``, started by the batch script outside the container, runs what the task of
rank 0 asks for, which is on the same node; they talk through files in FOLDER.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VARIABLE = "SLOTMAMBA_DOOR"  # names the folder in a container
POLL_SECONDS = 0.1


def run_slurm(command: Sequence[str], variables: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs one of Slurm's commands, outside of the container if this is one; what it prints is captured.

    Args:
        command: such as scontrol, with arguments.
        variables: what is added to the environment.
        timeout: in seconds.

    Raises:
        FileNotFoundError: there is no such command.
        subprocess.TimeoutExpired: no answer.
    """
    folder = os.environ.get(VARIABLE)
    if folder is None:
        return _run(command, variables, timeout)
    return _ask(Path(folder), command, variables, timeout)


def main(folder: Path) -> None:
    """Answers until the process that has started this one is gone."""
    for number in (signal.SIGTERM, signal.SIGUSR2):  # of the job, which may have been asked for here
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    folder.mkdir(exist_ok=True)
    for left in folder.iterdir():
        left.unlink()
    while os.getppid() == parent:
        for request in folder.glob("*.request"):
            asked = json.loads(request.read_text())
            request.unlink()
            _write(request.with_suffix(".answer"), _answer(**asked))
        time.sleep(POLL_SECONDS)


def _answer(command: list[str], variables: dict[str, str], timeout: float) -> dict[str, Any]:
    try:
        done = _run(command, variables, timeout)
    except FileNotFoundError:
        return {"missing": command[0]}
    except subprocess.TimeoutExpired:
        return {}
    return {"code": done.returncode, "out": done.stdout, "err": done.stderr}


def _ask(
    folder: Path, command: Sequence[str], variables: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    request = folder / f"{uuid.uuid4().hex}.request"
    _write(request, {"command": list(command), "variables": dict(variables), "timeout": timeout})
    answer, deadline = request.with_suffix(".answer"), time.monotonic() + timeout + 10
    while not answer.exists():
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(command, timeout)
        time.sleep(POLL_SECONDS)
    said = json.loads(answer.read_text())
    answer.unlink()
    if "missing" in said:
        raise FileNotFoundError(said["missing"])
    if "code" not in said:
        raise subprocess.TimeoutExpired(command, timeout)
    return subprocess.CompletedProcess(command, said["code"], said["out"], said["err"])


def _write(path: Path, content: dict[str, Any]) -> None:
    """The file appears whole."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.rename(path)


def _run(command: Sequence[str], variables: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ | dict(variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        preexec_fn=_outlive_the_step,
    )


def _outlive_the_step() -> None:
    """The SIGTERM that a requeue sends to every process of the step would end the scontrol that asked for it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
