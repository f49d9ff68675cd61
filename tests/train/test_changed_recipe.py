"""A run that goes on with another recipe says so, and counts what it has really seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slotmamba.errors import TrainingError
from slotmamba.metrics import read_metrics
from slotmamba.train import train
from slotmamba_data import PlanReader, Row, Tokenizer
from tests.train.runs import Runs


def test_changed_keys_are_told_and_recorded(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = runs.recipe(tmp_path, "train.steps=2")
    assert train(first) == 0
    assert "has changed" not in capsys.readouterr().out
    assert train(runs.recipe(tmp_path, "train.steps=3", "optim.lr=0.5")) == 0
    changes = [f"optim.lr was {first.optim.lr}, is 0.5", "train.steps was 2, is 3"]
    assert f"the recipe has changed since the run was last started: {'; '.join(changes)}" in capsys.readouterr().out
    (record,) = (record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "recipe")
    assert record == {"kind": "recipe", "step": 2, "changes": changes}


def test_tokens_are_those_of_the_rows_read(runs: Runs, tmp_path: Path) -> None:
    first = runs.recipe(tmp_path, "train.steps=2")
    batch = first.train.global_batch_tokens
    assert train(first) == 0
    assert train(runs.recipe(tmp_path, "train.steps=3", f"train.global_batch_tokens={2 * batch}")) == 0
    tokens = [record["tokens"] for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "train"]
    assert tokens == [batch, 2 * batch, 4 * batch]


def test_a_batch_without_labels_is_named_by_its_rows(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, because steps of another size came before."""
    first = runs.recipe(tmp_path, "train.steps=3")
    assert train(first) == 0
    original = PlanReader.next_batch

    def without_labels(reader: PlanReader, *arguments: int) -> list[Row]:
        return [replace(row, labels=np.full_like(row.labels, -100)) for row in original(reader, *arguments)]

    monkeypatch.setattr(PlanReader, "next_batch", without_labels)
    batch = 2 * first.train.global_batch_tokens
    with pytest.raises(TrainingError, match=r"^rows 12 to 19, those of one step: no position has a label$"):
        train(runs.recipe(tmp_path, "train.steps=4", f"train.global_batch_tokens={batch}"))


def test_the_run_keeps_its_tokenizer(runs: Runs, tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, "train.steps=2")
    if recipe.data.tokenizer is None:
        pytest.fail("the recipe of these tests trains on text")
    assert train(recipe) == 0
    assert Tokenizer(tmp_path / "tokenizer.model").digest == Tokenizer(recipe.data.tokenizer).digest
