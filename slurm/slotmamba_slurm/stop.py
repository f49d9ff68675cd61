"""Stopping jobs for good: none of them is queued or started again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slotmamba.errors import InputError
from slotmamba_slurm.queue import answer

_CONTROLLER = "slotmamba_slurm.controller"
_OVER = ("already finished", "already completing or completed", "Invalid job id specified")


def keep_from_starting_again(recipes: Sequence[Path], ids: Sequence[str]) -> None:
    """Tells the tasks of jobs, by a file beside their recipes, and Slurm, which would queue them again after a
    preemption or the loss of a node.

    Args:
        recipes: of submissions.
        ids: of jobs on Slurm.

    Raises:
        InputError: Slurm does not let this user change the jobs, or does not answer.
        OSError: a file cannot be written.
    """
    for recipe in recipes:
        stop_file(recipe).touch()
    for each in ids:
        _run(["scontrol", "update", f"JobId={each}", "Requeue=0"])


def stop_file(recipe: Path) -> Path:
    """The file that keeps a job from starting again; `recipe`: of its submission."""
    return recipe.with_suffix(".stop")


def tell_to_save(ids: Sequence[str]) -> None:
    """Signals the processes of running jobs, as Slurm does before the end of their time. A job that has none yet is
    told nothing.

    Raises:
        InputError: scancel fails.
    """
    if ids:
        _run(["scancel", "--signal=USR2", *ids])


def cancel(ids: Sequence[str]) -> None:
    """Has Slurm end jobs, those that wait at once, those that run with SIGTERM and then SIGKILL.

    Raises:
        InputError: scancel fails.
    """
    if ids:
        _run(["scancel", *ids])


def live_controllers(folder: Path, numbers: Sequence[int]) -> list[int]:
    """Of process numbers, those of controllers of cluster=local that run on this host for jobs in `folder`."""
    return [number for number in numbers if _is_controller(number, str(folder.absolute()).encode())]


def _is_controller(number: int, folder: bytes) -> bool:
    """The number may be that of any process by now."""
    try:
        command = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return _CONTROLLER.encode() in command and folder in command


def _run(command: Sequence[str]) -> None:
    """Runs a command of Slurm's; that a job has ended meanwhile is no failure."""
    _, problem = answer(command)
    if problem is not None and not any(words in problem for words in _OVER):
        raise InputError(f"{' '.join(command)}: {problem.removeprefix(f'{command[0]}: ')}")
