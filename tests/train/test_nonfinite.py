"""A loss or gradient that is not finite stops the run before the step, or the step is skipped, as the recipe says."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slotmamba.checkpoint.manifest import read_manifest
from slotmamba.models.slotmamba import SlotMambaForCausalLM, TokenLosses
from slotmamba.schedule import learning_rate
from slotmamba_data import PlanReader, Row
from tests.train.runs import (
    Runs,
    assert_same_run,
    assert_same_tensors,
    checkpoint,
    committed,
    fails,
    records,
    succeeds,
    tensors,
)

pytestmark = [pytest.mark.usefixtures("without_plots"), pytest.mark.timeout(300)]

EVERY_STEP = ["train.checkpoint.every=1", "train.checkpoint.keep=20", "train.steps=8"]


@dataclass
class Injection:
    """Makes losses, or only gradients, not finite at some steps, whichever process or micro-batch they are in."""

    steps: set[int] = field(default_factory=set)
    what: str = "loss"
    at_step: Callable[[int], object] = lambda step: None

    def change(self, step: int, losses: TokenLosses) -> TokenLosses:
        if step not in self.steps:
            return losses
        if self.what == "loss":
            return replace(losses, nll=losses.nll * math.nan)
        nll = losses.nll.clone()
        nll.register_hook(lambda gradient: gradient * math.inf)
        return replace(losses, nll=nll)


@pytest.fixture
def injection(monkeypatch: pytest.MonkeyPatch) -> Injection:
    injection = Injection()
    read, compute = PlanReader.next_batch, SlotMambaForCausalLM.losses
    step = 0

    def next_batch(reader: PlanReader, rows: int, *part: int) -> list[Row]:
        nonlocal step
        batch = read(reader, rows, *part)
        step = reader.samples_consumed // rows
        injection.at_step(step)
        return batch

    def losses(model: SlotMambaForCausalLM, *arguments: Tensor, **named: Any) -> TokenLosses:
        result = compute(model, *arguments, **named)
        return injection.change(step, result) if model.training else result

    monkeypatch.setattr(PlanReader, "next_batch", next_batch)
    monkeypatch.setattr(SlotMambaForCausalLM, "losses", losses)
    return injection


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_stop(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], injection: Injection, what: str) -> None:
    """The run stops before the step; once the cause is gone the same command goes on as if nothing had been."""
    injection.steps, injection.what = {4}, what
    settings = [*EVERY_STEP, "train.steps=5"]
    error = fails(capsys, runs.command(tmp_path / "run", *settings), 1)
    assert error.startswith("step 4: loss ") and "the weights were not changed" in error
    assert ("loss nan," in error) == (what == "loss")
    assert "train.on_nonfinite=skip" in error
    assert committed(tmp_path / "run") == [1, 2, 3]
    assert [record["step"] for record in records(tmp_path / "run", "train")] == [1, 2, 3]
    injection.steps = set()
    succeeds(runs.command(tmp_path / "run", *settings))
    succeeds(runs.command(tmp_path / "whole", *settings))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_skip(
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    injection: Injection,
    what: str,
) -> None:
    """The step leaves the weights alone and counts in every other respect."""
    injection.steps, injection.what = {3, 4, 6}, what
    settings = [*EVERY_STEP, "train.on_nonfinite=skip", "train.max_skips=3", "train.log_every=7"]
    succeeds(runs.command(tmp_path, *settings))
    log = {record["step"]: record for record in records(tmp_path, "train")}
    assert sorted(log) == [3, 4, 6, 7, 8], "skipped steps are always recorded"
    assert [step for step, record in log.items() if record["skipped"]] == [3, 4, 6]
    assert (log[3]["loss"] is None) == (what == "loss")
    assert log[3]["grad_norm"] is None
    recipe = runs.recipe(tmp_path, *settings)
    assert all(record["lr"] == learning_rate(recipe.optim, step - 1, 8) for step, record in log.items())
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [warning.split(":")[0] for warning in warnings] == ["step 3", "step 4", "step 6"]

    for step, updates in zip(range(1, 9), (1, 2, 2, 2, 3, 3, 4, 5), strict=True):
        manifest = read_manifest(checkpoint(tmp_path, step))
        assert manifest.updates == updates
        assert manifest.progress["data"]["samples_consumed"] == step * recipe.rows_per_step
        assert manifest.progress["skips_in_a_row"] == {3: 1, 4: 2, 6: 1}.get(step, 0)
    assert_same_tensors(tensors(tmp_path, 3), tensors(tmp_path, 2))
    assert_same_tensors(tensors(tmp_path, 4), tensors(tmp_path, 2))
    assert all(torch.isfinite(tensor).all() for tensor in tensors(tmp_path, 8).values())


def test_too_many_skips_in_a_row_stop_the_run(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], injection: Injection
) -> None:
    """Also where a signal and a resumption come between them."""
    injection.steps = {2, 4, 5, 6}
    injection.at_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None
    settings = ["train.steps=8", "train.on_nonfinite=skip", "train.max_skips=3"]
    succeeds(runs.command(tmp_path, *settings))
    assert "SIGTERM: saved at step 5 of 8" in capsys.readouterr().out
    error = fails(capsys, runs.command(tmp_path, *settings), 1)
    assert error.startswith("step 6: loss nan") and error.endswith("3 steps in a row were skipped (train.max_skips)")
    assert committed(tmp_path) == [3, 5]
