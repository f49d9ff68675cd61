"""Plots of a sweep as PNG files: what it is ranked by over the first key that it tries, and over the steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slotmamba.plots import render
from slotmamba.sweep_results import CellResult, SweepResults, setting_text
from slotmamba_data.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_RATIO = 10  # of the largest to the least value, from which on an axis is logarithmic


def plot_sweep(results: SweepResults, folder: Path) -> list[Path]:
    """Writes sweep.png, of cells that are finished, and steps.png, of all; returns those for which there are values.

    Raises:
        OSError: one cannot be written.
    """
    folder.mkdir(exist_ok=True)
    key = results.keys[0]
    images = {
        "sweep.png": render(results.name, key, lambda axes: _draw_over_key(axes, results, key)),
        "steps.png": render(results.name, "optimizer step", lambda axes: _draw_over_steps(axes, results)),
    }
    written = []
    for name, image in images.items():
        if image is not None:
            write_file(folder / name, image)
            written.append(folder / name)
    return written


def _draw_over_key(axes: Axes, results: SweepResults, key: str) -> None:
    """A line for each combination of the other keys."""
    lines: dict[str, list[tuple[Any, float]]] = {}
    for cell in results.cells:
        value = cell.last(results.measure)
        if cell.is_finished and value is not None and key in cell.settings:
            lines.setdefault(_others(cell, key), []).append((cell.settings[key], value))
    tried = [value for points in lines.values() for value, _ in points]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in tried)
    for label, points in lines.items():
        ordered = sorted(points, key=lambda point: point[0]) if numbers else points
        places = [value if numbers else setting_text(value) for value, _ in ordered]
        axes.plot(places, [value for _, value in ordered], marker="o", label=label or None)
    if numbers and tried and min(tried) > 0 and max(tried) >= LOG_RATIO * min(tried):
        axes.set_xscale("log")
    axes.set_ylabel(results.measure)


def _others(cell: CellResult, key: str) -> str:
    return ", ".join(f"{name}={setting_text(value)}" for name, value in cell.settings.items() if name != key)


def _draw_over_steps(axes: Axes, results: SweepResults) -> None:
    for cell in results.ranked:
        curve = cell.curves[results.measure]
        values = [math.nan if value is None else value for value in curve.values()]
        if curve:
            axes.plot(list(curve), values, marker="o" if len(curve) == 1 else "", label=cell.name)
    axes.set_ylabel(results.measure)
