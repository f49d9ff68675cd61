"""The results of a sweep as text, the best cell first: ``python -m slotmamba.sweep_report RUN_DIR`` writes results.txt,
results.csv and plots, as every cell does when it has ended."""

from __future__ import annotations

import csv
import fcntl
import io
import sys
from collections import Counter
from pathlib import Path

from slotmamba.files import write_text
from slotmamba.runs.words import number
from slotmamba.sweep_plots import plot_sweep
from slotmamba.sweep_results import IN_TROUBLE, MEANING, CellResult, SweepResults, setting_text, sweep_results
from slotmamba.tables import table

LAST_LINES = 8
PLOT_WIDTH = 40


def sweep_report(results: SweepResults) -> str:
    """A table of all cells, a plot of those that were measured, and the last lines that failed ones wrote."""
    states = Counter(cell.status.state for cell in results.ranked)
    head = f"{results.name}: {', '.join(f'{count} {state}' for state, count in states.items())}"
    notes = [f"{problem}: what is said of jobs is from the run folders alone" for problem in results.problems]
    measured = [cell for cell in results.cells if cell.last(results.measure) is not None]
    order = [f"best first by {MEANING[results.measure]}"] if measured else []
    parts = ["\n".join([head, *notes, *order]), _table(results)]
    parts += [_dots(results)] if len(measured) > 1 else []
    parts += [_failure(cell) for cell in results.ranked if cell.status.state in IN_TROUBLE]
    return "\n\n".join(parts) + "\n"


def _table(results: SweepResults) -> str:
    measures = [each for each in MEANING if any(cell.curves[each] for cell in results.cells)]
    rows = [
        (
            *(setting_text(cell.settings[key]) if key in cell.settings else "-" for key in results.keys),
            *(_number(cell, each) for each in measures),
            f"{cell.status.step}/{number(cell.status.total, 'd')}",
            cell.status.state,
        )
        for cell in results.ranked
    ]
    return table((*results.keys, *measures, "step", "state"), rows, left=("state",))


def _number(cell: CellResult, measure: str) -> str:
    value = cell.last(measure)
    return "nan" if value is None and cell.curves[measure] else number(value, ".4f")


def _dots(results: SweepResults) -> str:
    """A line for each cell that was measured, with a dot between the least and the largest value."""
    found = [(cell.name, cell.last(results.measure)) for cell in results.ranked]
    values = {name: value for name, value in found if value is not None}
    least, largest = min(values.values()), max(values.values())
    width = max(map(len, values))
    lines = [f"{results.measure} from {least:.4f} to {largest:.4f}"]
    for name, value in values.items():
        place = round((value - least) / (largest - least) * (PLOT_WIDTH - 1)) if largest > least else 0
        lines.append(f"{name:{width}}  |{' ' * place}o{' ' * (PLOT_WIDTH - 1 - place)}|")
    return "\n".join(lines)


def _failure(cell: CellResult) -> str:
    state, output = cell.status, cell.output
    lines = [f"{cell.name}: {state.state} after step {state.step}{f': {state.why}' if state.why else ''}"]
    if output is not None:
        last = output.read_text(errors="replace").rstrip().splitlines()[-LAST_LINES:]
        lines += [f"  {output}", *(f"    {line}" for line in last)]
    return "\n".join(lines)


def _csv(results: SweepResults) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["cell", *results.keys, *MEANING, "step", "steps", "state", "why"])
    for cell in results.ranked:
        settings = [setting_text(cell.settings[key]) if key in cell.settings else "" for key in results.keys]
        values, state = [cell.last(each) for each in MEANING], cell.status
        writer.writerow([cell.name, *settings, *values, state.step, state.total, state.state, state.why])
    return text.getvalue()


def write_results(folder: Path) -> str:
    """Writes results.txt, results.csv and plots into the folder of a sweep; returns the first, and where all are.

    Raises:
        InputError, OSError: as `sweep_results`, or a file cannot be written.
    """
    with (folder / ".results.lock").open("a") as lock:
        # Cells that end together: the one that writes last sees what the others left.
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = sweep_results(folder)
        text = sweep_report(results)
        files = {folder / "results.txt": text, folder / "results.csv": _csv(results)}
        for path, content in files.items():
            write_text(path, content)
        plots = plot_sweep(results, folder / "plots")
    return text + "".join(f"\n  {path}" for path in (*files, *plots)) + "\n"


if __name__ == "__main__":
    print(write_results(Path(sys.argv[1])), end="")
