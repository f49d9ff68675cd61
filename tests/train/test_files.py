from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slotmamba.files import write_json, write_text


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\x00old")
    write_text(path, "größer")
    assert path.read_bytes() == "größer".encode()
    write_json(path, {"a": [1, None, "ü"]})
    assert json.loads(path.read_text()) == {"a": [1, None, "ü"]}
    assert os.listdir(tmp_path) == ["a.json"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    script = """
import resource, sys
from pathlib import Path
from slotmamba.files import write_text
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try:
    write_text(Path(sys.argv[1]), "new" * 1000)
except OSError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert f"File too large: '{path}'" in result.stdout
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*nowhere/a.txt"):
        write_text(tmp_path / "nowhere" / "a.txt", "text")
