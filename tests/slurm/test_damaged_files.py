"""Files of jobs that are damaged, or not what they seem."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from submitit.core.utils import cloudpickle_dump

from slotmamba_slurm.history import History, history_file, newest_checkpoint, read_history
from slotmamba_slurm.jobs import note_job, rest_of_chain, submitted_jobs
from slotmamba_slurm.run_jobs import run_jobs


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "slurm").mkdir()
    return tmp_path


class Malicious:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_results_are_not_unpickled(run_dir: Path) -> None:
    result = run_dir / "slurm" / "7_0_result.pkl"
    ran = run_dir / "ran"
    for content in (Malicious(ran), ("success", Malicious(ran)), (Malicious(ran), "error")):
        result.write_bytes(pickle.dumps(content))
        run_jobs(run_dir).result("7")
        assert not ran.exists()
    for damaged in (b"", b"\x80", os.urandom(300), pickle.dumps(("succ", 0)), pickle.dumps(7)):
        result.write_bytes(damaged)
        assert run_jobs(run_dir).result("7") is None


def test_results(run_dir: Path) -> None:
    """As the tasks write them."""
    slurm = run_dir / "slurm"
    cloudpickle_dump(("success", 0), slurm / "7_0_result.pkl")
    assert run_jobs(run_dir).result("7") == "COMPLETED"
    cloudpickle_dump(("error", "Traceback\n" * 1000), slurm / "7_1_result.pkl")
    assert run_jobs(run_dir).result("7") == "FAILED"
    assert run_jobs(run_dir).result("8") is None


def test_a_torn_list_of_jobs(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for job in ("7", "8", "9"):
        note_job(run_dir, job, "slurm", "submission-001")
    path = run_dir / "slurm" / "jobs.jsonl"
    os.truncate(path, path.stat().st_size - 5)
    assert [each.job for each in submitted_jobs(run_dir)] == ["7", "8"] and rest_of_chain(run_dir, "7") == ["8"]
    assert capsys.readouterr().err == f"note: {path}: 1 line is damaged and left out\n"
    note_job(run_dir, "10", "slurm", "submission-002")
    assert [each.job for each in submitted_jobs(run_dir)] == ["7", "8", "10"]


@pytest.mark.parametrize("line", ["{}", "7", '{"job": 7}', '{"job": "*", "cluster": "slurm"}', "\x00\xff"])
def test_lines_that_are_no_records(line: str, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note_job(run_dir, "7", "slurm", "submission-001")
    History(run_dir, "7", 0).started("submission-001", ["node1"], processes=1)
    for path in (run_dir / "slurm" / "jobs.jsonl", history_file(run_dir)):
        with path.open("a", encoding="latin-1") as file:
            file.write(line + "\n")
    assert len(submitted_jobs(run_dir)) == len(read_history(run_dir)) == 1
    assert capsys.readouterr().err.count("1 line is damaged and left out") == 2


def test_folders_that_are_no_checkpoints(run_dir: Path) -> None:
    for name in ("step-00000010", "step-abc1"):
        (run_dir / "checkpoints" / name).mkdir(parents=True)
        (run_dir / "checkpoints" / name / "manifest.json").touch()
    assert newest_checkpoint(run_dir) == 10
