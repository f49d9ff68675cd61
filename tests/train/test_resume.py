"""The same command goes on where the run stopped, and a finished run is left alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from slotmamba.batch import plan_source
from slotmamba.cli import main
from slotmamba.config import load_recipe
from slotmamba.metrics import read_metrics
from slotmamba.train import train
from slotmamba_data import open_plan
from tests.train.runs import Runs, assert_same_run, assert_same_tensors, checkpoint, committed, records, tensors

pytestmark = [pytest.mark.usefixtures("without_plots"), pytest.mark.timeout(300)]

SETTINGS = ["train.eval_every=4", "train.checkpoint.every=1", "train.checkpoint.keep=20"]


@pytest.fixture(scope="module")
def finished(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps that was never interrupted, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slotmamba.train.plot_run", lambda run_dir: [])
        train(runs.recipe(folder, *SETTINGS))
    return folder


def stopped_after(finished: Path, step: int, run_dir: Path) -> Path:
    """A copy of the run as a kill leaves it that comes after the checkpoint of `step`: with later records."""
    shutil.copytree(finished, run_dir)
    for later in committed(run_dir):
        if later > step:
            shutil.rmtree(checkpoint(run_dir, later))
    return run_dir


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and bytes of every file, but for the logs, which say that it was started again."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "logs"]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_resumed_twice(runs: Runs, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = stopped_after(finished, 3, tmp_path / "run")
    assert main(runs.command(run_dir, *SETTINGS)) == 0
    assert "resumes after step 3 (row 12)" in capsys.readouterr().out
    for later in (8, 9, 10):
        shutil.rmtree(checkpoint(run_dir, later))
    assert main(runs.command(run_dir, *SETTINGS)) == 0
    assert "resumes after step 7 (row 28)" in capsys.readouterr().out
    assert_same_run(run_dir, finished)


def test_over_the_end_of_an_epoch(runs: Runs, tmp_path: Path) -> None:
    """Few rows, so that an epoch of the text ends every other step; resumed before each of the ends."""
    settings = ["data.sources.0.weight=0.01", "train.global_batch_tokens=960", "train.micro_batch=20", "train.steps=8",
                "train.checkpoint.every=1", "train.checkpoint.keep=20"]  # fmt: skip
    train(runs.recipe(tmp_path / "whole", *settings))
    recipe = runs.recipe(tmp_path)
    rows = open_plan([plan_source(recipe.data.sources[1])], 24, 0).describe()[0].contents.rows_per_epoch
    assert rows is not None and 2 * rows < 8 * 40, "the run should see more than two epochs"
    for step in (rows // 40, 2 * rows // 40):
        run_dir = stopped_after(tmp_path / "whole", step, tmp_path / f"from {step}")
        train(runs.recipe(run_dir, *settings))
        assert_same_run(run_dir, tmp_path / "whole")


def test_a_finished_run_is_left_alone(runs: Runs, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished)
    for steps in (10, 4):
        assert main(runs.command(finished, *SETTINGS, f"train.steps={steps}")) == 0
        out = capsys.readouterr().out
        assert out == f"tiny: already finished, 10 steps are done of {steps} asked for: {finished}\n"
        assert contents(finished) == before


def test_more_steps_go_on(runs: Runs, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    assert main(runs.command(run_dir, *SETTINGS, "train.steps=12")) == 0
    assert "resumes after step 10 (row 40)" in capsys.readouterr().out
    log, before = records(run_dir), records(finished)
    assert log[: len(before)] == before
    assert [(record["kind"], record["step"]) for record in log[len(before) :]] == [
        ("recipe", 10), ("train", 11), ("train", 12), ("validation", 12), ("validation", 12)
    ]  # fmt: skip
    assert committed(run_dir)[-1] == 12


def test_a_damaged_checkpoint_is_passed_over(
    runs: Runs, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = stopped_after(finished, 6, tmp_path / "run")
    with (checkpoint(run_dir, 6) / "__0_0.distcp").open("r+b") as stream:
        stream.seek(-100, 2)
        stream.write(b"damage")
    train(runs.recipe(run_dir, *SETTINGS))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("checkpoint of step 6 is skipped: ") and "__0_0.distcp" in warning
    assert_same_run(run_dir, finished)


def test_metrics_that_were_removed_start_anew(runs: Runs, finished: Path, tmp_path: Path) -> None:
    run_dir = stopped_after(finished, 6, tmp_path / "run")
    (run_dir / "metrics.jsonl").unlink()
    train(runs.recipe(run_dir, *SETTINGS))
    assert records(run_dir) == [record for record in records(finished) if record["step"] > 6]
    assert_same_tensors(tensors(run_dir, 10), tensors(finished, 10))


def test_metrics_that_are_torn_at_the_end_are_mended(runs: Runs, finished: Path, tmp_path: Path) -> None:
    run_dir = stopped_after(finished, 9, tmp_path / "run")
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]) + lines[-2][:30])
    train(runs.recipe(run_dir, *SETTINGS))
    assert_same_run(run_dir, finished)


def test_damaged_lines_of_metrics_are_set_aside(
    runs: Runs, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = stopped_after(finished, 9, tmp_path / "run")
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    garbage = [b"\0" * 8 + b"\n", b"{}\n"]
    path.write_bytes(b"".join([*lines[:3], garbage[0], *lines[3:5], garbage[1], *lines[5:]]))
    train(runs.recipe(run_dir, *SETTINGS))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == (
        f"{path}, line 4: expected a JSON object, found {garbage[0][:-1]!r}; moved to {path}.damaged with 1 more such "
        "lines"
    )
    assert (run_dir / "metrics.jsonl.damaged").read_bytes() == b"".join(garbage)
    assert_same_run(run_dir, finished)


@pytest.mark.parametrize("content", ["", "stesp: 3\n", "\0"])
def test_a_recipe_that_cannot_be_read_is_set_aside(
    runs: Runs, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    run_dir = stopped_after(finished, 9, tmp_path / "run")
    path = run_dir / "recipe.yaml"
    path.write_text(content)
    recipe = runs.recipe(run_dir, *SETTINGS)
    train(recipe)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"{path}: ")
    assert warning.endswith(f"; moved to {path}.damaged and written anew, its changes are not known")
    assert path.with_name("recipe.yaml.damaged").read_text() == content
    assert load_recipe(path) == recipe
    assert_same_run(run_dir, finished)


def test_records_are_whole_lines_of_json(finished: Path) -> None:
    log = read_metrics(finished / "metrics.jsonl")
    assert [record["step"] for record in log if record["kind"] == "train"] == list(range(1, 11))
    assert [record["step"] for record in log if record["kind"] == "validation"] == [4, 4, 8, 8, 10, 10]
