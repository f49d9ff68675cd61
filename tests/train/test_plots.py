from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from slotmamba.metrics import MetricsLog
from slotmamba.plots import plot_run

NAN = float("nan")


def write_run(run_dir: Path, records: list[dict[str, Any]]) -> None:
    log = MetricsLog(run_dir / "metrics.jsonl")
    for record in records:
        log.write(record)
    log.close()


def train(step: int, **values: float) -> dict[str, Any]:
    fixed = {"lr": 1e-3, "grad_norm": 1.0, "tokens": step, "tokens_per_second": 9.0, "time": 0.0}
    return {"kind": "train", "step": step, "loss": 1 / step, **fixed, **values}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The axes of every figure saved, by their y label."""
    axes: dict[str, Any] = {}
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        axes[figure.axes[0].get_ylabel()] = figure.axes[0]
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return axes


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_every_curve(tmp_path: Path, figures: dict[str, Any]) -> None:
    records = [train(step, **{"loss/text": 2 / step}) for step in (10, 20)]
    records[1] |= {"loss/facts": 0.5, "loss": NAN}
    records.append({"kind": "validation", "step": 20, "source": "text", "loss": 3.0, "bits_per_token": 4.3})
    records.append({"kind": "validation", "step": 20, "source": "facts", "loss": 1.0, "recall/128x8": 0.5})
    records[-1]["recall/64x4"] = 0.75
    write_run(tmp_path, records)
    paths = plot_run(tmp_path)
    names = ["loss", "recall", "learning_rate", "gradient_norm", "throughput"]
    assert paths == [tmp_path / "plots" / f"{name}.png" for name in names]
    for path in paths:
        image = imread(path)
        assert image.shape == (600, 960, 4)
        assert len(np.unique(image.reshape(-1, 4), axis=0)) > 10, "the picture is empty"
    loss = lines(figures["loss (nats per token)"])
    assert loss.keys() == {"train", "train: text", "train: facts", "validation: text", "validation: facts"}
    assert loss["train: text"] == ([10, 20], [0.2, 0.1])
    assert loss["train: facts"] == ([20], [0.5])
    assert loss["validation: text"] == ([20], [3.0])
    np.testing.assert_equal(loss["train"], ([10, 20], [0.1, NAN]))
    recall = lines(figures["recall (share of answers that are right)"])
    assert list(recall.items()) == [("64 tokens, 4 pairs", ([20], [0.75])), ("128 tokens, 8 pairs", ([20], [0.5]))]
    assert all(axes.get_xlabel() == "optimizer step" and axes.get_title() == tmp_path.name for axes in figures.values())


def test_recall_of_two_sources_is_told_apart(tmp_path: Path, figures: dict[str, Any]) -> None:
    write_run(
        tmp_path, [{"kind": "validation", "step": 1, "source": name, "loss": 1.0, "recall/64x4": 1.0} for name in "ab"]
    )
    plot_run(tmp_path)
    recall = figures["recall (share of answers that are right)"]
    assert list(lines(recall)) == ["a: 64 tokens, 4 pairs", "b: 64 tokens, 4 pairs"]


def test_only_what_has_values_is_drawn(tmp_path: Path) -> None:
    write_run(tmp_path, [train(1)])
    assert [path.stem for path in plot_run(tmp_path)] == ["loss", "learning_rate", "gradient_norm", "throughput"]


def test_no_records(tmp_path: Path) -> None:
    write_run(tmp_path, [])
    assert plot_run(tmp_path) == []


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        plot_run(tmp_path)
