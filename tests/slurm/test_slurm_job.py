"""Commands of Slurm's that fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from slotmamba_slurm import slurm_job
from slotmamba_slurm.slurm_job import SlurmError, SlurmJob, SlurmRefusalError, insist


def scontrol(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "scontrol").write_text(f"#!/bin/sh\necho >> {folder}/asked\n{script}\n")
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(slurm_job, "PAUSE", 0.01)


def test_asked_until_there_is_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = f"[ $(wc -l < {tmp_path}/asked) = 3 ] || {{ echo 'Socket timed out' >&2; exit 1; }}; echo JobState=RUNNING"
    scontrol(tmp_path, script, monkeypatch)
    assert insist(SlurmJob("7").fields) == {"JobState": "RUNNING"}
    assert capsys.readouterr().out == "scontrol -o show job 7: Socket timed out: asking again for up to 600 s\n"


def test_asked_no_more_after_a_refusal_or_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol(tmp_path, "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", monkeypatch)
    with pytest.raises(SlurmRefusalError, match="Invalid job id"):
        insist(SlurmJob("7").fields)
    assert (tmp_path / "asked").read_text() == "\n"
    scontrol(tmp_path, "echo 'Unable to contact slurm controller' >&2; exit 1", monkeypatch)
    monkeypatch.setattr(slurm_job, "PATIENCE", 0)
    with pytest.raises(SlurmError, match="Unable to contact"):
        insist(SlurmJob("7").fields)
