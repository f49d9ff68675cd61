"""`slotmamba runs ...` in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slotmamba.cli import main


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """What `slotmamba runs` with `arguments` prints, on standard output and standard error; it ends with 0."""
    capsys.readouterr()
    code = main(["runs", *arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def listed(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> dict[str, dict[str, Any]]:
    """The runs below a folder, by name, in the order of the list; nothing is noted."""
    out, err = said(capsys, "list", str(folder), "--json", *options)
    assert err == ""
    return {run["name"]: run for run in json.loads(out)}
