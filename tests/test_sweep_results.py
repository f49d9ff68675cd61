"""What is told of a sweep, from the folders of its cells: states, the order, the table, the plots."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from slotmamba.cli import main
from slotmamba.config import load_recipe, save_recipe
from slotmamba.config.cells import Cell, load_sweep
from slotmamba.config.sweep_file import read_sweep, record_sweep
from slotmamba.errors import InputError
from slotmamba.sweep_report import sweep_report, write_results
from slotmamba.sweep_results import RECALL, TRAINING, VALIDATION, not_to_submit, sweep_results
from slotmamba_slurm.jobs import note_job

SHORT = ["train.steps=20", "optim.warmup=1"]
LOG = "2026-01-01 00:00:00,000 INFO slotmamba.{}: {}\n"


def sweep_in(folder: Path, *overrides: str) -> list[Cell]:
    """Records a sweep of mqar-tiny, of which nothing has trained."""
    sweep = load_sweep("mqar-tiny", [f"run_dir={folder}", *SHORT, *overrides])
    folder.mkdir(exist_ok=True)
    record_sweep(sweep)
    return list(sweep.cells)


def trained(cell: Cell, end: str, *records: Mapping[str, Any]) -> None:
    """Leaves what a start that came to an `end` does, of which these are the records."""
    folder = cell.recipe.run_path
    (folder / "logs").mkdir(parents=True)
    save_recipe(cell.recipe, folder / "recipe.yaml")
    lines = LOG.format("faults.logs", "rank 0 of 1: process 1 on host")
    lines += LOG.format("progress", f"{cell.recipe.name}: starts, 5 parameters") + end
    (folder / "logs" / "rank-00000.log").write_text(lines)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def finished(cell: Cell, *records: Mapping[str, Any]) -> None:
    trained(cell, LOG.format("progress", f"{cell.recipe.name}: finished 20 steps: {cell.recipe.run_path}"), *records)


def train(step: int, loss: float | None) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss}


def validation(step: int, source: str, loss: float | None, *recall: float) -> dict[str, Any]:
    settings = {f"recall/{16 * (number + 1)}x2": value for number, value in enumerate(recall)}
    return {"kind": "validation", "step": step, "source": source, "loss": loss, **settings}


def test_ranked_by_recall(tmp_path: Path) -> None:
    """The mean over all settings of all sources, the largest first; of equals the one with the smaller loss."""
    cells = sweep_in(tmp_path, "sweep.seed=[1,2,3]")
    finished(cells[0], train(20, 3.0), validation(10, "a", 1.0, 0.9, 0.9), validation(20, "a", 2.0, 0.4, 0.6))
    finished(cells[1], train(20, 3.0), validation(20, "a", 1.0, 0.5, 0.5), validation(20, "b", 2.0, 0.5))
    finished(cells[2], train(20, 4.0), validation(20, "a", 9.0, 0.6, 0.6))
    results = sweep_results(tmp_path)
    assert results.measure == RECALL
    assert [cell.settings["seed"] for cell in results.ranked] == [3, 2, 1]
    assert [cell.last(RECALL) for cell in results.ranked] == pytest.approx([0.6, 0.5, 0.5])
    assert [cell.last(VALIDATION) for cell in results.ranked] == [9.0, 1.5, 2.0]


def test_ranked_by_loss(tmp_path: Path) -> None:
    """Where not all validation is recall, by its loss; one that is not finite comes after all that are."""
    cells = sweep_in(tmp_path, "sweep.seed=[1,2,3]")
    finished(cells[0], train(20, None), validation(20, "a", None, 0.5), validation(20, "text", 1.0))
    finished(cells[1], train(20, 3.0), validation(20, "a", 2.0, 0.1), validation(20, "text", 4.0))
    finished(cells[2], train(20, 3.0), validation(20, "a", 2.0, 0.9), validation(20, "text", 3.0))
    results = sweep_results(tmp_path)
    assert results.measure == VALIDATION
    assert [cell.settings["seed"] for cell in results.ranked] == [3, 2, 1]
    assert sweep_report(results).splitlines()[3:] == [
        "seed  validation loss  training loss   step  state",
        "----  ---------------  -------------  -----  --------",
        "3              2.5000         3.0000  20/20  finished",
        "2              3.0000         3.0000  20/20  finished",
        "1                 nan            nan  20/20  finished",
        "",
        "validation loss from 2.5000 to 3.0000",
        f"seed=3  |o{' ' * 39}|",
        f"seed=2  |{' ' * 39}o|",
    ]


def test_without_validation(tmp_path: Path) -> None:
    cells = sweep_in(tmp_path, "sweep.seed=[1,2]")
    finished(cells[0], train(10, 1.0), train(20, 3.0))
    finished(cells[1], train(10, 4.0), train(20, 2.0))
    results = sweep_results(tmp_path)
    assert results.measure == TRAINING
    assert [cell.settings["seed"] for cell in results.ranked] == [2, 1]


def test_every_state_is_told(tmp_path: Path) -> None:
    """Finished cells first, then the others as far as they are; of those that failed the last lines of their output."""
    cells = sweep_in(tmp_path, "sweep.seed=[1,2,3,4]", "sweep.optim.lr=[0.5]")
    trained(cells[0], LOG.format("faults.logs", "the process fails: step 11: loss nan"), train(10, 0.1))
    trained(
        cells[1],
        LOG.format("progress", "SIGTERM: saved at step 10 of 20; the same command resumes: x"),
        train(10, 0.2),
    )
    finished(cells[3], train(20, 3.0))
    jobs = cells[0].recipe.run_path / "slurm"
    jobs.mkdir()
    (jobs / "7_0_0_log.out").write_text("".join(f"line {number}\n" for number in range(20)))
    report = sweep_report(sweep_results(tmp_path))
    assert report.startswith("mqar-tiny: 1 finished, 1 failed, 1 stopped, 1 new\nbest first by training loss\n\n")
    rows = [line.split() for line in report.splitlines()[5:9]]
    assert [(row[0], row[3], row[4]) for row in rows] == [
        ("4", "20/20", "finished"),
        ("1", "10/20", "failed"),
        ("2", "10/20", "stopped"),
        ("3", "0/-", "new"),
    ]
    last = [f"    line {number}" for number in range(12, 20)]
    failure = [f"{cells[0].name}: failed after step 10: step 11: loss nan", f"  {jobs / '7_0_0_log.out'}", *last]
    assert report.splitlines()[-10:] == failure


def test_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`runs show` of the folder writes them too."""
    cells = sweep_in(tmp_path, "sweep.optim.lr=[1e-3,1e-1]", "sweep.model.slots.top_k=[4,8]")
    for number, cell in enumerate(cells[:3]):
        finished(cell, train(20, 3.0), validation(10, "a", 2.0, 0.1), validation(20, "a", 2.0, 0.1 * number))
    written = write_results(tmp_path)
    assert main(["runs", "show", str(tmp_path)]) == 0
    assert capsys.readouterr().out == written
    names = ["results.txt", "results.csv", "plots/sweep.png", "plots/steps.png"]
    assert written == (tmp_path / "results.txt").read_text() + "\n" + "".join(f"  {tmp_path / n}\n" for n in names)
    assert all((tmp_path / name).stat().st_size > 0 for name in names)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["optim.lr"], row["model.slots.top_k"], row["recall"], row["state"]) for row in rows] == [
        ("0.1", "4", "0.2", "finished"),
        ("0.001", "8", "0.1", "finished"),
        ("0.001", "4", "0.0", "finished"),
        ("0.1", "8", "", "new"),
    ]


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    cells = sweep_in(tmp_path, "sweep.optim.schedule=[cosine,wsd]", "sweep.model.decoder_attn_layer=[null,-2]")
    for cell in cells:
        finished(cell, train(20, 3.0))
    write_results(tmp_path)
    assert (tmp_path / "plots" / "sweep.png").is_file()
    rows = [line.split()[:2] for line in (tmp_path / "results.txt").read_text().splitlines()[5:9]]
    assert rows == [["cosine", "null"], ["cosine", "-2"], ["wsd", "null"], ["wsd", "-2"]]


def test_other_values_are_added(tmp_path: Path) -> None:
    """Results of cells that were submitted before stay, whatever keys they set."""
    sweep_in(tmp_path, "sweep.seed=[1,2]")
    sweep_in(tmp_path, "sweep.seed=[2,3]")
    assert [cell.settings for cell in read_sweep(tmp_path).cells] == [{"seed": 1}, {"seed": 2}, {"seed": 3}]
    sweep_in(tmp_path, "sweep.optim.lr=[0.5]")
    assert sweep_results(tmp_path).keys == ["seed", "optim.lr"]
    assert sweep_report(sweep_results(tmp_path)).splitlines() == [
        "mqar-tiny: 4 new",
        "",
        "seed  optim.lr  step  state",
        "----  --------  ----  -----",
        "1            -   0/-  new",
        "2            -   0/-  new",
        "3            -   0/-  new",
        "-          0.5   0/-  new",
    ]


def test_what_is_not_submitted_again(tmp_path: Path) -> None:
    """Cells that are finished, unless they are to train otherwise now."""
    cells = sweep_in(tmp_path, "sweep.seed=[1,2,3]")
    finished(cells[0], train(20, 3.0))
    finished(cells[1], train(20, 3.0))
    values = [f"run_dir={tmp_path}", *SHORT, "sweep.seed=[1,2,4]", "slurm.nodes=3"]
    skipped = not_to_submit(load_sweep("mqar-tiny", values))
    assert {reason: [cell.name for cell in cells] for reason, cells in skipped.items()} == {
        "already finished": ["seed=1", "seed=2"],
        "queued or running already": [],
    }
    assert not_to_submit(load_sweep("mqar-tiny", [*values, "train.steps=30"]))["already finished"] == []


def test_slurm_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = sweep_in(tmp_path, "sweep.seed=[1]")
    (cell.recipe.run_path / "slurm").mkdir(parents=True)
    note_job(cell.recipe.run_path, "7_0", "slurm", "submission-001")
    monkeypatch.setenv("PATH", str(tmp_path))
    problem = "there is no squeue on PATH"
    assert f"\n{problem}: what is said of jobs is from the run folders alone\n" in sweep_report(sweep_results(tmp_path))
    with pytest.raises(InputError, match=f"^{problem}: whether cells are queued already is not known$"):
        not_to_submit(load_sweep("mqar-tiny", [f"run_dir={tmp_path}", "sweep.seed=[1]"]))


def test_a_job_that_slurm_calls_running_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that write the results at their end count themselves as ended, and those that ended just before."""
    cells = sweep_in(tmp_path, "sweep.seed=[1,2]")
    tools = tmp_path / "tools"
    tools.mkdir()
    rows = "".join(f"7_{number}|RUNNING|None|node1|2025-01-01T00:00:00\\n" for number in (0, 1))
    (tools / "squeue").write_text(f"#!/bin/sh\nprintf '{rows}'\n")
    (tools / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    for number, cell in enumerate(cells):
        finished(cell, train(20, 3.0))
        (cell.recipe.run_path / "slurm").mkdir()
        note_job(cell.recipe.run_path, f"7_{number}", "slurm", "submission-001")
    assert [cell.status.state for cell in sweep_results(tmp_path).cells] == ["running", "running"]
    (tmp_path / "seed=1" / "slurm" / "7_0_0_result.pkl").write_bytes(pickle.dumps(("success", 0)))
    (tmp_path / "seed=2" / "slurm" / "7_1_0_result.pkl").symlink_to("not/there")
    assert [cell.status.state for cell in sweep_results(tmp_path).cells] == ["finished", "running"]


def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(InputError, match=r"sweep\.json: expected what `slotmamba submit` wrote: 'cells'$"):
        sweep_results(tmp_path)


def test_the_installed_sweep() -> None:
    assert len(load_sweep("mqar-sweep-tiny").cells) == 4
    assert load_recipe("mqar-sweep-tiny", ["sweep=null"]).sweep is None
