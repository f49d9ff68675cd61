"""Damaged files of a run hide neither the others nor what its sound files say."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from slotmamba.cli import main
from slotmamba_slurm.history import History
from slotmamba_slurm.jobs import note_job
from tests.runs.commands import said
from tests.slurm.jobs import arguments

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", *arguments(run, "train.steps=2")]) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, beside a sound one."""
    for name in ("odd", "sound"):
        shutil.copytree(finished, tmp_path / name)
    return tmp_path / "odd"


def noted(run: Path, capsys: pytest.CaptureFixture[str], *names: str) -> None:
    """The list has both runs, and `show` works; each of the files has one note."""
    out, err = said(capsys, "list", str(run.parent), "--json")
    assert [(each["name"], each["state"]) for each in json.loads(out)] == [("odd", "finished"), ("sound", "finished")]
    err += said(capsys, "show", str(run))[1]
    assert all(f"{run}/{name}" in err for name in names) and err.count("\n") == len(names), err


@pytest.mark.parametrize("content", ["a: [b", "x: 2026-99-99", "- 1", "\x00\x01", "\x80\xff"])
def test_recipe(content: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "recipe.yaml").write_bytes(content.encode("latin-1"))
    noted(run, capsys, "recipe.yaml")


def test_environment(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "environment.json").write_bytes(b'{"git": \x80')
    out, err = said(capsys, "show", str(run))
    assert " 2 of 2 " in out and err == f"note: {run}/environment.json is damaged and left out\n"


def test_logs_and_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step-abc1").mkdir()
    (run / "checkpoints" / "step-abc1" / "manifest.json").touch()
    (run / "logs" / "heartbeat-00000.json").write_bytes(os.urandom(1000))
    noted(run, capsys, "logs/heartbeat-00000.json")
    for path in (run / "logs").iterdir():
        path.write_bytes(os.urandom(1000))
    said(capsys, "list", str(run.parent))
    said(capsys, "show", str(run))


def test_files_of_jobs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "slurm").mkdir()
    History(run, "7", 0).ended("finished", 0, "finished")  # without a start
    note_job(run, "7", "local", "submission-001")
    path = run / "slurm" / "jobs.jsonl"
    os.truncate(path, path.stat().st_size - 5)
    noted(run, capsys, "slurm/history.jsonl", "slurm/jobs.jsonl")


@pytest.mark.parametrize("content", ['{"x": [', "{}", '{"name": "a", "cells": [{"name": 7, "settings": {}}]}', "\x80"])
def test_sweep(content: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells are found as other runs are."""
    (run.parent / "sweep").mkdir()
    run.rename(run.parent / "sweep" / "cell")
    (run.parent / "sweep" / "sweep.json").write_bytes(content.encode("latin-1"))
    out, err = said(capsys, "list", str(run.parent), "--json")
    assert [each["name"] for each in json.loads(out)] == ["sound", "sweep/cell"]
    assert f"{run.parent}/sweep/sweep.json: " in err and err.count("\n") == 1


def test_values_of_another_type(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 2, "time": "noon"}\n')
    out, err = said(capsys, "list", str(run.parent), "--json")
    assert [each["name"] for each in json.loads(out)] == ["sound"]
    assert err.startswith("note: odd: a file of it is damaged, and the run left out: ")
