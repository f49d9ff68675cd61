"""The results of a sweep as text, the best cell first: ``python -m slotmamba.sweep_report RUN_DIR`` writes results.txt,
results.csv and plots. Every cell does so when it has ended."""

from __future__ import annotations

import csv
import fcntl
import io
import re
import sys
from collections import Counter
from pathlib import Path

from slotmamba.files import write_text
from slotmamba.sweep_plots import plot_sweep
from slotmamba.sweep_results import MEANING, CellResult, SweepResults, setting_text, sweep_results
from slotmamba.tables import table

LAST_LINES = 8
PLOT_WIDTH = 40
TASK_ERROR = re.compile(
    r"^Traceback \(most recent call last\):\n(?: .*\n)+RuntimeError: slotmamba train ended with exit code \d+$",
    re.MULTILINE,
)


def sweep_report(results: SweepResults) -> str:
    """A table of all cells, a plot of those that were measured, and the last lines that failed ones wrote."""
    counts = Counter(cell.state for cell in results.cells)
    states = ", ".join(f"{count} {state}" for state, count in counts.items() if state != "done")
    head = f"{results.name}: {counts['done']} of {len(results.cells)} cells done{f', {states}' if states else ''}"
    parts = [f"{head}\nbest first by {MEANING[results.measure]}\n\n{_table(results)}"]
    parts += [_dots(results)] if sum(cell.last(results.measure) is not None for cell in results.cells) > 1 else []
    parts += [_failure(cell) for cell in results.ranked if cell.state == "failed"]
    return "\n\n".join(parts) + "\n"


def _table(results: SweepResults) -> str:
    measures = [each for each in MEANING if any(cell.curves[each] for cell in results.cells)]
    rows = [
        (
            *(setting_text(cell.cell.settings[key]) if key in cell.cell.settings else "" for key in results.keys),
            *(_number(cell, each) for each in measures),
            f"{cell.step}/{cell.cell.steps}",
            cell.state,
        )
        for cell in results.ranked
    ]
    return table((*results.keys, *measures, "step", "state"), rows)


def _number(cell: CellResult, measure: str) -> str:
    if not cell.curves[measure]:
        return ""
    value = cell.last(measure)
    return "nan" if value is None else f"{value:.4f}"


def _dots(results: SweepResults) -> str:
    """A line for each cell that was measured, with a dot between the least and the largest value."""
    found = [(cell.cell.name, cell.last(results.measure)) for cell in results.ranked]
    values = {name: value for name, value in found if value is not None}
    least, largest = min(values.values()), max(values.values())
    width = max(map(len, values))
    lines = [f"{results.measure} from {least:.4f} to {largest:.4f}"]
    for name, value in values.items():
        place = round((value - least) / (largest - least) * (PLOT_WIDTH - 1)) if largest > least else 0
        lines.append(f"{name:{width}}  |{' ' * place}o{' ' * (PLOT_WIDTH - 1 - place)}|")
    return "\n".join(lines)


def _failure(cell: CellResult) -> str:
    assert cell.output is not None
    text = cell.output.read_text(errors="replace") if cell.output.is_file() else "there is no output"
    # What the task and srun add says no more than that it has failed.
    lines = [line for line in TASK_ERROR.sub("", text).rstrip().splitlines() if not line.startswith("srun: ")]
    head = f"{cell.cell.name} failed after step {cell.step}: job {cell.cell.job}, {cell.output}"
    return "\n".join([head, *(f"    {line}" for line in lines[-LAST_LINES:])])


def _csv(results: SweepResults) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["cell", *results.keys, *MEANING, "step", "steps", "state", "job"])
    for cell in results.ranked:
        settings = [setting_text(cell.cell.settings.get(key, "")) for key in results.keys]
        values = [cell.last(each) for each in MEANING]
        writer.writerow([cell.cell.name, *settings, *values, cell.step, cell.cell.steps, cell.state, cell.cell.job])
    return text.getvalue()


def write_results(folder: Path) -> str:
    """Writes results.txt, results.csv and plots into the folder of a sweep; returns the first.

    Raises:
        InputError, OSError: as `sweep_results`, or a file cannot be written.
    """
    with (folder / ".results.lock").open("a") as lock:
        # Cells that end together: the one that writes last sees what the others left.
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = sweep_results(folder)
        text = sweep_report(results)
        write_text(folder / "results.txt", text)
        write_text(folder / "results.csv", _csv(results))
        plot_sweep(results, folder / "plots")
    return text


if __name__ == "__main__":
    print(write_results(Path(sys.argv[1])), end="")
