"""The lines that all processes of a run wrote, in the order of time, and those that are still to come.

There are two kinds of files for each rank. RUN_DIR/logs/rank-00000.log has times; what a job's task printed,
RUN_DIR/slurm/JOB_0_log.out, has none, but repeats lines of the first, which tell when the others between them came.
"""

from __future__ import annotations

import heapq
import re
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

POLL_SECONDS = 0.3
QUESTION_SECONDS = 3.0
_TIMED = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) [A-Z]+ [\w.]+: (.*)")
_RANK_LOG = re.compile(r"rank-(\d{5,})\.log")
_OUTPUT = re.compile(r"\d+(?:_\d+)?_(\d+)_log\.(?:out|err)")

Timed = tuple[str, int, str]
"""Time as the log has it, rank, line."""


@dataclass
class _Tail:
    """A file that grows, read by whole lines."""

    path: Path
    rank: int
    time: str = ""  # of the line before
    _position: int = 0
    _rest: bytes = b""

    def lines(self, last: bool) -> Iterator[str]:
        """What has been added since the last call; `last`: the end of a line is not waited for."""
        with self.path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        self._position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if last and self._rest:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            yield line.decode(errors="replace").rstrip("\r")


@dataclass
class RunLogs:
    """The logs of a run; each call of `new` returns what was written since the one before. rank: of this one only."""

    run_dir: Path
    rank: int | None = None
    _logs: dict[Path, _Tail] = field(default_factory=dict)
    _outputs: dict[Path, _Tail] = field(default_factory=dict)
    _times: dict[tuple[int, str], deque[str]] = field(default_factory=lambda: defaultdict(deque))

    def new(self, last: bool = False) -> list[Timed]:
        """New lines in the order of time.

        Args:
            last: nothing more will be written: a line that has no end yet counts too.

        Raises:
            OSError: a file cannot be read.
        """
        self._find_new()
        # First what was written last: a process logs a line before it prints it.
        printed = {path: list(tail.lines(last)) for path, tail in self._outputs.items()}
        streams = [self._logged(tail, last) for tail in self._logs.values()]
        streams += [self._printed(self._outputs[path], lines) for path, lines in printed.items()]
        return list(heapq.merge(*streams, key=lambda timed: timed[0]))

    def _find_new(self) -> None:
        for path in sorted((self.run_dir / "logs").glob("rank-*.log")):
            if (found := _RANK_LOG.fullmatch(path.name)) and self.rank in (None, int(found[1])):
                self._logs.setdefault(path, _Tail(path, int(found[1])))
        for path in sorted((self.run_dir / "slurm").glob("*_log.*")):
            found = _OUTPUT.fullmatch(path.name)
            if found and self.rank in (None, int(found[1])):
                self._outputs.setdefault(path, _Tail(path, int(found[1])))

    def _logged(self, tail: _Tail, last: bool) -> list[Timed]:
        """Lines of a log; those without a time, as of a traceback, have that of the line before."""
        lines = []
        for line in tail.lines(last):
            if found := _TIMED.match(line):
                tail.time = max(tail.time, found[1])
            self._times[tail.rank, found[2] if found else line].append(tail.time)
            lines.append((tail.time, tail.rank, line))
        return lines

    def _printed(self, tail: _Tail, lines: list[str]) -> list[Timed]:
        """Lines of an output that are not in the log."""
        known: list[tuple[str, str | None]] = []  # time, and the line where it is to be shown
        for line in lines:
            in_log = self._times.get((tail.rank, line))
            if in_log:
                tail.time = max(tail.time, in_log.popleft())
                known.append((tail.time, None))
                continue
            if found := _TIMED.match(line):
                tail.time = max(tail.time, found[1])
            known.append((tail.time, line if line.strip() else None))
        # Those before the first whose time is known: that of the first, or else of the last write.
        first = next((time for time, _ in known if time), None) or _as_logged(tail.path.stat().st_mtime)
        return [(time or first, tail.rank, line) for time, line in known if line is not None]


def _as_logged(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "milliseconds").replace(".", ",")


def shown(lines: list[Timed], prefixed: bool) -> list[str]:
    """With ``[rank]`` before each where there are several."""
    return [f"[{rank}] {line}" if prefixed else line for _, rank, line in lines]


def follow(logs: RunLogs, is_over: Callable[[], bool], say: Callable[[str], object]) -> None:
    """Says new lines, of all ranks and all starts, until the run is over.

    Args:
        logs: of which the lines so far have been read.
        is_over: whether the run has ended for good; asked every few seconds.
        say: takes a line.
    """
    asked = 0.0
    while True:
        over = False
        if time.monotonic() - asked > QUESTION_SECONDS:
            over = is_over()  # before the last look, so that nothing is missed
            asked = time.monotonic()
        for line in shown(logs.new(last=over), logs.rank is None):
            say(line)
        if over:
            return
        time.sleep(POLL_SECONDS)
