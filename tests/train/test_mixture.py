"""Mixtures in the training loop: shares and losses by source in metrics.jsonl, curricula, and sources that run out."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import pytest

from slotmamba.batch import training_plan
from slotmamba.config import Recipe
from slotmamba.train import train
from tests.train.runs import Runs, assert_same_run, records

pytestmark = [pytest.mark.usefixtures("without_plots"), pytest.mark.timeout(300)]


def test_shares_losses_and_epochs_are_recorded(runs: Runs, tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, "train.steps=30", "data.sources.0.weight=1", "data.sources.1.weight=3")
    assert train(recipe) == 0
    log = records(tmp_path, "train")
    plan = training_plan(recipe)
    rows = plan.describe()[1].contents.rows_per_epoch
    assert rows is not None
    for step, record in enumerate(log, 1):
        counts = plan.turns.counts(step * recipe.rows_per_step)
        assert record["share/recall"] + record["share/text"] == pytest.approx(1)
        assert record["share/text"] == counts[1] / sum(counts)
        assert record["epochs/text"] == counts[1] / rows
        assert "epochs/recall" not in record and 0 <= record["pad_share"] < 0.5
        assert {"loss/text", "loss/recall"} <= record.keys()
    assert log[-1]["share/text"] == pytest.approx(0.75, abs=1 / sum(counts))


def test_a_curriculum_goes_by_steps_and_resumes(runs: Runs, tmp_path: Path) -> None:
    settings = [
        "train.steps=12",
        "train.checkpoint.every=4",
        "data.sources.0.weight=0",
        "data.sources.0.weight_changes=[{step: 3, weight: 0}, {step: 9, weight: 1, linear: true}]",
        "data.sources.1.weight=1",
        "data.sources.1.weight_changes=[{step: 9, weight: 0}]",
    ]
    assert train(runs.recipe(tmp_path / "whole", *settings)) == 0
    log = records(tmp_path / "whole", "train")
    assert ["loss/recall" in record for record in log[:3]] == [False] * 3
    shares = [record["share/recall"] for record in log]
    assert shares[2] == 0 and shares == sorted(shares) and shares[-1] > shares[8] > shares[5]
    assert ["loss/text" in record for record in log[9:]] == [False] * 3  # only recall is left
    assert train(runs.recipe(tmp_path / "parts", *settings, "train.steps=5")) == 0
    assert train(runs.recipe(tmp_path / "parts", *settings)) == 0
    ours, theirs = (records(tmp_path / name, "train") for name in ("parts", "whole"))
    assert [record["share/recall"] for record in ours] == [record["share/recall"] for record in theirs]


def test_weights_changed_in_the_recipe_hold_from_the_resume_on(runs: Runs, tmp_path: Path) -> None:
    def recipe(steps: int, weight: float, *more: str) -> Recipe:
        return runs.recipe(tmp_path, f"train.steps={steps}", f"data.sources.1.weight={weight}", *more)

    only_text = "data.sources.0.weight_changes=[{step: 20, weight: 0}]"
    for steps, weight, more in ((6, 1.0, []), (14, 9.0, []), (24, 9.0, [only_text]), (28, 9.0, [only_text])):
        assert train(recipe(steps, weight, *more)) == 0
    log = records(tmp_path, "train")
    rows = recipe(6, 1.0).rows_per_step
    text = [record["share/text"] * record["step"] * rows for record in log]
    start = recipe(6, 1.0).data.sources[0].weight

    def gained(first: int, last: int) -> float:
        return (text[last - 1] - (text[first - 1] if first else 0)) / ((last - first) * rows)

    assert gained(0, 6) == pytest.approx(1 / (1 + start), abs=1 / (6 * rows))
    assert gained(6, 14) == pytest.approx(9 / (9 + start), abs=1.1 / (8 * rows))
    assert gained(20, 28) == 1
    changes = [change for record in records(tmp_path, "recipe") for change in record["changes"]]
    assert any(change.startswith("data.sources was") for change in changes)


def test_a_source_that_stops_ends_the_run(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = runs.recipe(tmp_path, "train.steps=1000", "data.sources.1.on_exhausted=stop", "data.sources.1.weight=20")
    ends = training_plan(recipe).ends()
    assert ends is not None
    steps = ends[0] // recipe.rows_per_step
    assert 2 < steps < 200
    assert train(recipe) == 0
    printed = capsys.readouterr().out
    assert f"ends after step {steps}, where source 'text' is exhausted" in printed
    assert f"finished {steps} steps" in printed
    log = records(tmp_path, "train")
    assert log[-1]["step"] == steps and log[-1]["epochs/text"] <= 1 < log[-1]["epochs/text"] * (steps + 2) / steps
    assert log[-1]["lr"] == pytest.approx(recipe.optim.lr * recipe.optim.min_lr_ratio)
    assert train(recipe) == 0
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"source 'text' is exhausted after .* too few for a run with optim\.warmup=900"
    ):
        train(recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"warmup": 900})}))


def test_documents_fitted_whole_train_and_resume(runs: Runs, tmp_path: Path) -> None:
    settings = ["data.packing=best_fit", "train.steps=8", "train.checkpoint.every=3", "train.checkpoint.keep=9"]
    assert train(runs.recipe(tmp_path / "whole", *settings)) == 0
    assert train(runs.recipe(tmp_path / "parts", *settings, "train.steps=3")) == 0
    with pytest.raises(ValueError, match=r"source text: packing \(was best_fit, is concat\)"):
        train(runs.recipe(tmp_path / "parts", *settings, "data.packing=concat"))
    assert train(runs.recipe(tmp_path / "parts", *settings)) == 0
    ours, theirs = (records(tmp_path / name, "train")[-1] for name in ("parts", "whole"))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.2)  # the learning rate went another way
    assert ours["epochs/text"] == theirs["epochs/text"]


def test_damaged_documents_are_left_out_and_counted(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(Path(runs.recipe(tmp_path).data.sources[1].shards), tmp_path / "shards")
    path = tmp_path / "shards/shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    settings = [f"data.sources.1.shards={tmp_path / 'shards'}", "train.steps=3"]
    with pytest.raises(ValueError, match=r"shard-000000\.tar is damaged between bytes 0 and"):
        train(runs.recipe(tmp_path / "error", *settings))
    for name in ("skip", "again"):
        assert train(runs.recipe(tmp_path / name, *settings, "data.on_corrupt=skip")) == 0
    assert_same_run(tmp_path / "again", tmp_path / "skip")
    counts = [record["skipped_documents"] for record in records(tmp_path / "skip", "train")]
    assert 0 < counts[0] < counts[-1]


def test_workers_change_nothing_but_who_reads(runs: Runs, tmp_path: Path) -> None:
    settings = ["train.steps=8", "train.checkpoint.every=3"]
    assert train(runs.recipe(tmp_path / "plain", *settings)) == 0
    assert train(runs.recipe(tmp_path / "ahead", *settings, "data.workers=2")) == 0
    assert_same_run(tmp_path / "ahead", tmp_path / "plain")
    for later in ("step-00000006", "step-00000008"):
        shutil.rmtree(tmp_path / "ahead/checkpoints" / later)
    assert train(runs.recipe(tmp_path / "ahead", *settings, "data.workers=1")) == 0
    assert_same_run(tmp_path / "ahead", tmp_path / "plain")
    assert multiprocessing.active_children() == []
