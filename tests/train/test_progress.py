from __future__ import annotations

import io
import re
import subprocess
import sys

from rich.console import Console

from slotmamba.progress import Progress

TRAIN = {"kind": "train", "loss": 3.25, "lr": 1e-3, "tokens_per_second": 12345.6, "time": 1.0}
VALIDATION = {"kind": "validation", "source": "facts", "loss": 2.0, "bits_per_token": 2.885, "recall/64x4": 0.5}


def test_plain_lines() -> None:
    out = io.StringIO()
    with Progress(1000, 100, Console(file=out, width=20)) as progress:
        progress.message("resumes [after] step 100, in a line longer than the console is wide")
        progress.update(110, TRAIN)
        progress.update(110, VALIDATION)
        progress.update(1000, TRAIN | {"loss": float("nan")})
    lines = out.getvalue().splitlines()
    assert lines[0] == "resumes [after] step 100, in a line longer than the console is wide"
    assert re.fullmatch(r"step 110/1000  loss 3\.2500  lr 1\.00e-03  12,346 tokens/s  \d+:\d\d:\d\d left", lines[1])
    assert lines[2] == "step 110/1000  validation facts  loss 2.0000  2.8850 bits/token  recall/64x4 0.500"
    assert lines[3].startswith("step 1000/1000  loss nan") and lines[3].endswith("0:00:00 left")
    assert len(lines) == 4


def test_bar_on_a_terminal() -> None:
    out = io.StringIO()
    with Progress(1000, 100, Console(file=out, force_terminal=True, width=150)) as progress:
        progress.message("resumes after step 100")
        progress.update(500, TRAIN)
        progress.update(500, VALIDATION)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "resumes after step 100\n" in text
    assert "validation facts  loss 2.0000" in text
    last = text.splitlines()[-1]
    assert last.startswith("step 500/1000")
    assert "loss 3.2500  lr 1.00e-03  12,346 tokens/s" in last


def test_the_terminal_is_restored_after_an_error() -> None:
    out = io.StringIO()
    try:
        with Progress(10, 0, Console(file=out, force_terminal=True)):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l"), "the cursor stays hidden"


def test_lines_reach_a_pipe_at_once() -> None:
    script = """
import os
from slotmamba.progress import Progress
with Progress(10, 0) as progress:
    progress.message("hello")
    os._exit(0)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "hello\n"
