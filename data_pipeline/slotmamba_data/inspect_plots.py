"""Pictures of what `slotmamba data inspect` found."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from slotmamba_data.inspection import Lengths

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def lengths_picture(lengths: Lengths) -> bytes:
    """PNG: documents by their number of tokens."""

    def draw(axes: Axes) -> None:
        names = [f"{least}" if least == most else f"{least}-{most}" for least, most, _ in lengths.ranges()]
        axes.bar(names, [documents for _, _, documents in lengths.ranges()])
        axes.tick_params(axis="x", rotation=45)
        axes.set_ylabel("documents")

    return _picture("lengths of documents", "tokens", draw)


def shares_picture(names: Sequence[str], rows: Sequence[int], shares: np.ndarray) -> bytes:
    """PNG: the share of each source in the rows of a run, window by window.

    Args:
        names: of the sources.
        rows: where the windows end.
        shares: float [windows, sources].
    """

    def draw(axes: Axes) -> None:
        for name, line in zip(names, shares.T, strict=True):
            axes.plot(rows, line, label=name)
        axes.set_ylim(-0.02, 1.02)
        axes.set_ylabel("share of the rows")
        axes.legend()

    return _picture("mixture over the run", "row", draw)


def throughput_picture(speeds: Mapping[int, float]) -> bytes:
    """PNG: tokens a second by number of workers."""

    def draw(axes: Axes) -> None:
        axes.bar([str(workers) for workers in speeds], [speed / 1e6 for speed in speeds.values()])
        axes.set_ylabel("million tokens a second")

    return _picture("reading rows", "workers (0: in the training process)", draw)


def _picture(title: str, xlabel: str, draw: Callable[[Axes], None]) -> bytes:
    # A figure of its own draws with Agg: no display, no state left behind. Imported late, for it takes long.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.grid(alpha=0.3)
    draw(axes)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
