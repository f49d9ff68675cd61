from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slotmamba.metrics import MetricsLog, read_metrics


def test_records_come_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"kind": "train", "step": step, "loss": 1 / (step + 3), "skipped": False} for step in range(3)]
    log = MetricsLog(path)
    for number, record in enumerate(records, start=1):
        log.write(record)
        assert read_metrics(path) == records[:number]
    log.sync()
    log.close()
    log = MetricsLog(path)
    log.write({"step": 3})
    assert read_metrics(path) == [*records, {"step": 3}]


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).write({"step": 1, "a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 0.5})
    assert path.read_text() == '{"step": 1, "a": null, "b": null, "c": null, "d": 0.5}\n'
    assert read_metrics(path) == [{"step": 1, "a": None, "b": None, "c": None, "d": 0.5}]


def test_truncate_after(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 2, 3, 4):
        log.write({"step": step, "loss": 0.1 * step})
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:3])
    with path.open("ab") as stream:
        stream.write(b'{"step": 2, "lo')
    log.truncate_after(2)
    assert path.read_bytes() == kept
    log.write({"step": 3})
    assert path.read_bytes() == kept + b'{"step": 3}\n'
    log.truncate_after(0)
    assert path.read_bytes() == b""
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_truncate_after_drops_the_kind_that_will_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    records = [{"step": step, "kind": kind} for step in (1, 2, 3) for kind in ("train", "validation", "validation")]
    for record in records:
        log.write(record)
    log.truncate_after(2, repeated="validation")
    assert read_metrics(path) == records[:4]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    assert read_metrics(path) == [{"step": 1}]


@pytest.mark.parametrize("line", ["{torn", "[1]", '{"loss": 1.0}', '{"step": null}', ""])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a JSON object"):
        read_metrics(path)


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    script = """
import resource, sys
from pathlib import Path
from slotmamba.metrics import MetricsLog
log = MetricsLog(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    for step in range(100):
        log.write({"step": step})
except OSError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert f"cannot write {path}: File too large" in result.stdout
    written = path.read_bytes()
    assert 80 < len(written) <= 100
    assert [json.loads(line)["step"] for line in written.splitlines()] == list(range(len(written.splitlines())))
    assert written.endswith(b"\n")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/metrics\.jsonl"):
        MetricsLog(tmp_path / "nowhere" / "metrics.jsonl")
