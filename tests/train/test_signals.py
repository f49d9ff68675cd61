"""SIGINT and SIGTERM: the run saves, says that the same command resumes, and exits 0."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from tests.forking import Command
from tests.train.runs import Commands, Runs, assert_same_run, committed, records

pytestmark = pytest.mark.timeout(300)

SETTINGS = ["train.steps=6", "train.eval_every=3", "train.checkpoint.every=100"]
SIGNALS = [signal.SIGINT, signal.SIGTERM]
LONG_VALIDATION = [*SETTINGS, "train.eval_rows=60"]
LONG_STEP = ["train.steps=3", "train.global_batch_tokens=1536", "train.micro_batch=1", "train.checkpoint.every=1"]


@pytest.fixture(scope="module")
def uninterrupted(runs: Runs, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert commands.run(runs.command(folder, *SETTINGS)).code == 0
    return folder


def train_records(run_dir: Path) -> int:
    """Steps in metrics.jsonl so far."""
    return len(records(run_dir, "train")) if (run_dir / "metrics.jsonl").exists() else 0


def assert_saved(command: Command, number: signal.Signals, run_dir: Path) -> int:
    """The process has saved and said so in its last line; returns the step."""
    assert command.wait() == 0, command.err
    assert command.err == ""
    last = command.out.splitlines()[-1]
    found = re.fullmatch(
        rf"{number.name}: saved at step (\d+) of \d+; the same command resumes: {re.escape(str(run_dir))}", last
    )
    assert found, command.out
    assert committed(run_dir)[-1] == int(found[1])
    return int(found[1])


def send_within_a_step(command: Command, *numbers: signal.Signals) -> None:
    """For use after a checkpoint: the step that follows it has 64 passes, seconds in which all of the signals come."""
    time.sleep(0.3)
    for number in numbers:
        command.send(number)
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_in_training(
    runs: Runs, commands: Commands, uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = commands.start(runs.command(tmp_path, *SETTINGS))
    assert command.wait_until(lambda: train_records(tmp_path) > 0)
    command.send(number)
    assert 1 <= assert_saved(command, number, tmp_path) < 6
    command = commands.run(runs.command(tmp_path, *SETTINGS))
    assert (command.code, command.err) == (0, "")
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_before_the_first_step(
    runs: Runs, commands: Commands, uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = commands.start(runs.command(tmp_path, *SETTINGS))
    # The lock is taken once the handlers are in; what follows takes longer than this process needs to see it.
    assert command.wait_until((tmp_path / ".lock").exists)
    command.send(number)
    assert assert_saved(command, number, tmp_path) == 0
    assert records(tmp_path) == []
    command = commands.run(runs.command(tmp_path, *SETTINGS))
    assert (command.code, command.err) == (0, "")
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 6], ids=["between steps", "after the last step"])
def test_in_validation(runs: Runs, commands: Commands, tmp_path: Path, step: int) -> None:
    """It is given up; the same command makes up for it, also where all steps are done."""
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert commands.run(runs.command(whole, *LONG_VALIDATION)).code == 0
    command = commands.start(runs.command(run_dir, *LONG_VALIDATION))
    assert command.wait_until(lambda: train_records(run_dir) == step)
    time.sleep(0.05)
    command.send(signal.SIGTERM)
    assert assert_saved(command, signal.SIGTERM, run_dir) == step
    assert step not in [record["step"] for record in records(run_dir, "validation")]

    # Killed when it has made up for it, and before the next checkpoint: it must not be there twice.
    command = commands.start(runs.command(run_dir, *LONG_VALIDATION))
    assert command.wait_until(lambda: step in [record["step"] for record in records(run_dir, "validation")])
    command.send(signal.SIGKILL)
    command.wait()
    command = commands.run(runs.command(run_dir, *LONG_VALIDATION))
    assert (command.code, command.err) == (0, "")
    assert_same_run(run_dir, whole)


@pytest.mark.slow
def test_a_second_sigint_ends_it_at_once_and_loses_nothing_committed(
    runs: Runs, commands: Commands, tmp_path: Path
) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert commands.run(runs.command(whole, *LONG_STEP)).code == 0
    command = commands.start(runs.command(run_dir, *LONG_STEP))
    assert command.wait_until(lambda: committed(run_dir) == [1])
    send_within_a_step(command, signal.SIGINT, signal.SIGINT)
    assert command.wait() == 130
    assert command.err == "error: interrupted\n"
    assert "saved at" not in command.out
    assert committed(run_dir) == [1]
    command = commands.run(runs.command(run_dir, *LONG_STEP))
    assert (command.code, command.err) == (0, "")
    assert "resumes after step 1 " in command.out
    assert_same_run(run_dir, whole)


@pytest.mark.slow
def test_a_second_sigterm_changes_nothing(runs: Runs, commands: Commands, tmp_path: Path) -> None:
    command = commands.start(runs.command(tmp_path, *LONG_STEP))
    assert command.wait_until(lambda: committed(tmp_path) == [1])
    send_within_a_step(command, signal.SIGINT, signal.SIGTERM, signal.SIGTERM)
    assert assert_saved(command, signal.SIGINT, tmp_path) == 2


@pytest.mark.slow
def test_the_installed_command(runs: Runs, commands: Commands, uninterrupted: Path, tmp_path: Path) -> None:
    """As a user starts and stops it, in interpreters of their own."""
    command = commands.start_anew(runs.command(tmp_path, *SETTINGS))
    assert command.wait_until(lambda: train_records(tmp_path) > 1)
    command.send(signal.SIGINT)
    assert_saved(command, signal.SIGINT, tmp_path)
    command = commands.start_anew(runs.command(tmp_path, *SETTINGS))
    assert command.wait() == 0, command.err
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
def test_two_processes_in_one_folder(runs: Runs, commands: Commands, tmp_path: Path) -> None:
    first = commands.start(runs.command(tmp_path, *LONG_STEP))
    assert first.wait_until(lambda: committed(tmp_path) == [1])
    second = commands.run(runs.command(tmp_path, *LONG_STEP))
    assert (second.code, second.out) == (2, "")
    assert second.err == (f"error: another process is training in {tmp_path}: wait for it or set another run_dir\n")
    assert first.poll() is None
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    third = commands.start(runs.command(tmp_path, *LONG_STEP))
    assert third.wait_until(lambda: "resumes after step" in third.out), "a killed process holds no lock"
    third.send(signal.SIGKILL)
    third.wait()
