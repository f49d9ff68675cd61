"""One run in full, as text."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from slotmamba.runs.folder import RunFolder
from slotmamba.runs.starts import Start
from slotmamba.runs.status import RUNNING, Status, end_of
from slotmamba.runs.terminal_plot import Point, plot
from slotmamba.runs.words import duration, folded, number
from slotmamba.tables import table

_FACT_WIDTH = 12


def facts(status: Status, folder: RunFolder) -> str:
    """What is known of a run, a line each."""
    lines = [f"{status.name}: {status.state}{f': {status.why}' if status.why else ''}"]
    lines += [f"  {name:<{_FACT_WIDTH}}{value}" for name, value in _facts(status, folder) if value]
    return "\n".join(lines)


def _facts(status: Status, folder: RunFolder) -> Iterator[tuple[str, str]]:
    yield "run folder", status.path
    yield "job", status.job or ""
    yield "nodes", status.nodes
    yield "processes", _processes(folder)
    share = f" ({status.step / status.total:.1%})" if status.total else ""
    yield "step", f"{status.step} of {number(status.total, 'd')}{share}"
    yield "ETA", "" if status.eta is None else _until(status.eta)
    yield "loss", number(status.loss, ".4f")
    yield "validation", _validation(folder)
    yield "tokens/s", number(status.tokens_per_second, ",.0f")
    yield (
        "last seen",
        "" if status.seen is None else f"{duration(time.time() - status.seen)} ago{_phase(status, folder)}",
    )
    yield "checkpoints", ", ".join(f"step {step}" for step in folder.checkpoints) or "none"
    yield "code", _code(folder)
    yield "hardware", _hardware(folder)


def _processes(folder: RunFolder) -> str:
    if not folder.recipe:
        return ""
    count = folder.starts[-1].processes if folder.starts else folder.parallel.size
    return f"{count} ({folder.parallel.engine})"


def _until(seconds: float) -> str:
    return f"{duration(seconds)}, at {datetime.fromtimestamp(time.time() + seconds):%Y-%m-%d %H:%M}"


def _phase(status: Status, folder: RunFolder) -> str:
    main = next((beat for beat in folder.beats if beat.rank == 0), None)
    return f": {main}" if main and status.state == RUNNING else ""


def _validation(folder: RunFolder) -> str:
    """The last loss of each source."""
    last = {record["source"]: record for record in folder.records("validation") if "source" in record}
    parts = [f"{name} {number(record.get('loss'), '.4f')} at step {record['step']}" for name, record in last.items()]
    return ", ".join(parts)


def _code(folder: RunFolder) -> str:
    environment = folder.environment
    if not environment:
        return ""
    git = environment.get("git")
    commit = f", commit {git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else ""
    return f"slotmamba {environment.get('slotmamba')}{commit}, torch {environment.get('packages', {}).get('torch')}"


def _hardware(folder: RunFolder) -> str:
    environment = folder.environment
    if not environment:
        return ""
    gpus = [gpu["name"] for gpu in environment.get("gpus", [])]
    cpu = environment.get("cpu", {})
    return f"{len(gpus)} x {gpus[0]} on each node" if gpus else f"{cpu.get('usable_cores')} cores of {cpu.get('model')}"


def starts_table(starts: Sequence[Start], running: bool) -> str:
    """Every start and how it ended, oldest first; `running`: the last one has not ended."""
    rows = []
    for count, start in enumerate(starts, start=1):
        last = running and count == len(starts)
        where = f"{folded(start.nodes)}: {start.processes} process{'es' if start.processes > 1 else ''}"
        begins = "-" if start.step is None else str(start.step)
        ended = "running" if last and start.end is None else end_of(start)
        rows.append(
            (
                str(count),
                start.job or "-",
                f"{datetime.fromtimestamp(start.time):%Y-%m-%d %H:%M:%S}",
                begins,
                where,
                ended,
            )
        )
    return table(("start", "job", "at", "from step", "on", "ended"), rows, left=("job", "at", "on", "ended"))


def curves(folder: RunFolder, braille: bool) -> str:
    """Loss, tokens per second, and the losses of validation sources that have several, as plots of text."""
    train, validation = folder.records("train"), folder.records("validation")
    drawn = {"loss": _points(train, "loss"), "tokens per second": _points(train, "tokens_per_second")}
    for name in dict.fromkeys(record.get("source") for record in validation):
        points = _points([record for record in validation if record.get("source") == name], "loss")
        if len(points) > 1:
            drawn[f"validation loss: {name}"] = points
    return "\n\n".join(plot(title, points, braille) for title, points in drawn.items() if points)


def _points(records: Sequence[dict[str, Any]], key: str) -> list[Point]:
    return [(record["step"], math.nan if record[key] is None else record[key]) for record in records if key in record]
