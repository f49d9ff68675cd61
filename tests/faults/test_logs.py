"""The log of rank 0, which is all there is in a run of one process."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import torch

from slotmamba.faults import rank_log
from slotmamba.world import World

ALONE = World.alone(torch.device("cpu"))


def test_what_rank_0_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with rank_log(tmp_path / "logs", ALONE):
        logging.getLogger("slotmamba.x").info("a step")
        logging.getLogger("slotmamba.x").warning("look out")
        logging.getLogger("other").info("chatter")
        warnings.warn("old", stacklevel=1)
    log = (tmp_path / "logs" / "rank-00000.log").read_text()
    assert "rank 0 of 1: process " in log
    assert (
        "INFO slotmamba.x: a step\n" in log and "WARNING slotmamba.x: look out\n" in log and "UserWarning: old" in log
    )
    assert "chatter" not in log
    assert log.endswith(" INFO slotmamba.faults.logs: the process ends\n")
    terminal = capsys.readouterr().err
    assert terminal.startswith("look out\n") and "UserWarning: old" in terminal and "a step" not in terminal
    logging.getLogger("slotmamba.x").info("after")
    assert "after" not in (tmp_path / "logs" / "rank-00000.log").read_text()


def test_an_exception_and_a_second_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), rank_log(tmp_path, ALONE):
            raise ZeroDivisionError("a bug")
    log = (tmp_path / "rank-00000.log").read_text()
    assert log.count("Traceback") == log.count("\nZeroDivisionError: a bug\n") == 2
    assert log.count(" ERROR slotmamba.faults.logs: the process fails: ZeroDivisionError: a bug\n") == 2
    assert "the process ends" not in log
    assert capsys.readouterr().err == ""


def test_a_full_disk_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank-00000.log").symlink_to("/dev/full")
    with rank_log(tmp_path, ALONE):
        logging.getLogger("slotmamba.x").warning("look out")
    assert capsys.readouterr().err == "look out\n"
