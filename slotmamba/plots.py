"""Curves of a run as PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slotmamba.metrics import read_metrics
from slotmamba_data.files import write_file
from slotmamba_data.mqar_spec import MQARSetting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = list[dict[str, Any]]


def plot_run(run_dir: Path) -> list[Path]:
    """`plot_records` of ``run_dir/metrics.jsonl``.

    Raises:
        OSError: metrics.jsonl cannot be read, or a plot not be written.
        InputError: metrics.jsonl is damaged.
    """
    return plot_records(run_dir, read_metrics(run_dir / "metrics.jsonl"))


def plot_records(run_dir: Path, records: Records) -> list[Path]:
    """Draw the curves of a run into ``run_dir/plots``, each quantity that has values in a file.

    A value that was not finite leaves a gap.

    Returns:
        The files written, of loss.png, recall.png, mixture.png, learning_rate.png, gradient_norm.png, throughput.png.

    Raises:
        OSError: a plot cannot be written.
    """
    train = [record for record in records if record["kind"] == "train"]
    validation = [record for record in records if record["kind"] == "validation"]
    plots: dict[str, Callable[[Axes], None]] = {
        "loss": lambda axes: _draw_loss(axes, train, validation),
        "recall": lambda axes: _draw_recall(axes, validation),
        "mixture": lambda axes: _draw_shares(axes, train),
        "learning_rate": lambda axes: _draw_one(axes, train, "lr", "learning rate"),
        "gradient_norm": lambda axes: _draw_one(axes, train, "grad_norm", "gradient norm before clipping"),
        "throughput": lambda axes: _draw_one(axes, train, "tokens_per_second", "tokens per second"),
    }
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    written = []
    for name, draw in plots.items():
        image = render(run_dir.resolve().name, "optimizer step", draw)
        if image is not None:
            path = folder / f"{name}.png"
            write_file(path, image)
            written.append(path)
    return written


def render(title: str, xlabel: str, draw: Callable[[Axes], None]) -> bytes | None:
    """PNG of the lines that ``draw`` puts on the axes; None when there are none."""
    # A figure of its own draws with Agg: no display, no state left behind. Imported late, for it takes long.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    if not axes.lines:
        return None
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _draw_loss(axes: Axes, train: Records, validation: Records) -> None:
    """Training loss, the same by source, validation dashed; a source has one colour in both."""
    keys = _keys(train, "loss/")
    names = [key.removeprefix("loss/") for key in keys]
    names += [name for name in _sources(validation) if name not in names]
    colours = {name: f"C{number}" for number, name in enumerate(names, start=1)}
    _line(axes, train, "loss", label="train", color="C0", linewidth=1.5)
    for key in keys:
        name = key.removeprefix("loss/")
        _line(axes, train, key, label=f"train: {name}", color=colours[name], linewidth=1, alpha=0.7)
    for name in _sources(validation):
        records = [record for record in validation if record["source"] == name]
        _line(axes, records, "loss", label=f"validation: {name}", color=colours[name], linestyle="--", marker="o")
    axes.set_ylabel("loss (nats per token)")


def _draw_recall(axes: Axes, validation: Records) -> None:
    """Share of right answers of every source and setting, as ``recall/SETTING`` says it."""
    keys = sorted(_keys(validation, "recall/"), key=_setting)
    sources = _sources([record for record in validation if any(key in record for key in keys)])
    for name in sources:
        records = [record for record in validation if record["source"] == name]
        for key in keys:
            prefix = f"{name}: " if len(sources) > 1 else ""
            _line(axes, records, key, label=prefix + _setting(key)[-1], marker="o")
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("recall (share of answers that are right)")


def _draw_shares(axes: Axes, train: Records) -> None:
    """The share of each source in all rows so far."""
    for key in _keys(train, "share/"):
        _line(axes, train, key, label=key.removeprefix("share/"))
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("share of the rows so far")


def _draw_one(axes: Axes, train: Records, key: str, label: str) -> None:
    _line(axes, train, key, linewidth=1.5)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(label)


def _line(axes: Axes, records: Records, key: str, **style: Any) -> None:
    """The values under ``key`` over the steps of the records that have it."""
    points = [(record["step"], record[key]) for record in records if key in record]
    if points:
        steps, values = zip(*points, strict=True)
        # A line through one point would not be seen.
        style.setdefault("marker", "o" if len(points) == 1 else "")
        axes.plot(steps, [math.nan if value is None else value for value in values], markersize=4, **style)


def _keys(records: Records, prefix: str) -> list[str]:
    """Distinct keys with the prefix, in the order in which they appear."""
    return list(dict.fromkeys(key for record in records for key in record if key.startswith(prefix)))


def _sources(records: Records) -> list[str]:
    return list(dict.fromkeys(record["source"] for record in records))


def _setting(key: str) -> tuple[int, int, str]:
    """Length, pairs and label of ``recall/64x4``; of samples from shards there is ``recall/all`` only."""
    if key == "recall/all":
        return 0, 0, "all samples"
    setting = MQARSetting.named(key.removeprefix("recall/"))
    return setting.length, setting.pairs, setting.title
