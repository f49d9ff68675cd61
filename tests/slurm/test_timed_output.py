from __future__ import annotations

import io
import re

from slotmamba_slurm.timed_output import TimedLines

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO slotmamba_slurm\.task: "


def test_every_line_has_a_time() -> None:
    stream = io.StringIO()
    lines = TimedLines(stream)
    print("one", "two", file=lines, flush=True)
    print("three\nfour", file=lines)
    assert re.fullmatch(f"{TIME}one two\n{TIME}three\n{TIME}four\n", stream.getvalue())
