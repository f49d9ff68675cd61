"""What goes wrong is one clear line, exit code 1 or 2, and loses nothing that was committed."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slotmamba.checkpoint.manifest import read_manifest
from slotmamba.cli import main
from slotmamba.models.slotmamba import SlotMambaForCausalLM, TokenLosses
from slotmamba.schedule import learning_rate
from slotmamba_data import MQARSetting, MQARSpec, PlanReader, Row, build_mqar, train_tokenizer
from tests.train.runs import Runs, assert_same_run, assert_same_tensors, checkpoint, committed, records, tensors

pytestmark = [pytest.mark.usefixtures("without_plots"), pytest.mark.timeout(300)]

EVERY_STEP = ["train.checkpoint.every=1", "train.checkpoint.keep=20", "train.steps=8"]


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> str:
    """Runs a command that ends with `code` and one line on stderr, which it returns without `error: `."""
    capsys.readouterr()
    assert main(arguments) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ").rstrip("\n")


def succeeds(arguments: list[str]) -> None:
    assert main(arguments) == 0


# --- a loss or gradient that is not finite


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

    def next_batch(reader: PlanReader, rows: int) -> list[Row]:
        nonlocal step
        batch = read(reader, rows)
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
    error = fails(capsys, runs.command(tmp_path / "run", *EVERY_STEP), 1)
    assert error.startswith("step 4: loss ") and "the weights were not changed" in error
    assert ("loss nan," in error) == (what == "loss")
    assert "train.on_nonfinite=skip" in error
    assert committed(tmp_path / "run") == [1, 2, 3]
    assert [record["step"] for record in records(tmp_path / "run", "train")] == [1, 2, 3]
    injection.steps = set()
    succeeds(runs.command(tmp_path / "run", *EVERY_STEP))
    succeeds(runs.command(tmp_path / "whole", *EVERY_STEP))
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


# --- data, recipe and model


@pytest.fixture
def started(runs: Runs, tmp_path: Path) -> Path:
    """A run with data of its own, two of four steps done."""
    shutil.copytree(runs.folder, tmp_path / "data")
    succeeds(["train", *own(tmp_path), "train.steps=2"])
    return tmp_path


def own(folder: Path) -> list[str]:
    """Arguments of the run in `folder` on the data there."""
    return [
        str(Runs(folder / "data").file), f"run_dir={folder}/run", "train.steps=4", "train.checkpoint.every=2"
    ]  # fmt: skip


def truncate(folder: Path) -> str:
    path = folder / "data" / "train" / "shard-000000.tar"
    os.truncate(path, 1000)
    return f"source 'text': shard {path} has 1000 bytes instead of "


def damage(folder: Path) -> str:
    """Seen only when it is read."""
    path = folder / "data" / "train" / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[::-1])
    return f"shard {path} is damaged between bytes "


def remove_index(folder: Path) -> str:
    (path,) = (folder / "data" / "train").glob("*.npz")
    path.unlink()
    return f"source 'text': index {path} is missing: "


def remove_shards(folder: Path) -> str:
    shutil.rmtree(folder / "data" / "train")
    return f"source 'text': {folder}/data/train does not exist: build it with"


def remove_tokenizer(folder: Path) -> str:
    shutil.rmtree(folder / "data" / "tokenizer")
    return f"there is no tokenizer {folder}/data/tokenizer: make one with"


@pytest.mark.parametrize("spoil", [truncate, damage, remove_index, remove_shards, remove_tokenizer])
def test_data_that_are_not_there(
    started: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], str]
) -> None:
    shutil.copytree(started / "data", started / "saved")
    message = spoil(started)
    assert fails(capsys, ["train", *own(started)], 2).startswith(message)
    assert committed(started / "run") == [2]
    shutil.rmtree(started / "data")
    (started / "saved").rename(started / "data")
    succeeds(["train", *own(started)])
    assert committed(started / "run") == [2, 4]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stesp=4", "override train.stesp=4: train.stesp: unknown key; did you mean train.steps?"),
        ("train.steps=four", "override train.steps=four: train.steps: expected an integer at least 1 or null, "
         "got 'four'"),
        ("model.d_model=32", "{run}/checkpoints/step-00000002 is of another model: model.d_model is 16 there and 32 "
         "here"),
        ("seed=1", "the data are not those of the saved run; changed: seed (was 0, is 1). Resume with the same data, "
         "or start a new run"),
        ("data.sources.0.weight=2", "the data are not those of the saved run; changed: source recall: weight (was 1.0, "
         "is 2.0). Resume with the same data, or start a new run"),
        ("model.vocab_size=300", "model.vocab_size=300, but the data have tokens up to 379: set it to 380 or more"),
        ("run_dir={data}/tiny.yaml", "{data}/tiny.yaml: File exists"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_run(
    started: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    places = {"run": started / "run", "data": started / "data"}
    before = {path: path.read_bytes() for path in (started / "run").rglob("*") if path.is_file()}
    assert fails(capsys, ["train", *own(started), override.format(**places)], 2) == message.format(**places)
    assert {path: path.read_bytes() for path in (started / "run").rglob("*") if path.is_file()} == before
    succeeds(["train", *own(started)])


def test_shards_of_another_text(started: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under the name of those of the checkpoint."""
    shutil.rmtree(started / "data" / "train")
    shutil.copytree(started / "data" / "val", started / "data" / "train")
    error = fails(capsys, ["train", *own(started)], 2)
    assert error.startswith(
        "the data are not those of the saved run; changed: source text: shard shard-000000.tar (was "
    )
    assert committed(started / "run") == [2]


def test_a_tokenizer_that_did_not_make_the_shards(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer([runs.folder / "all.txt"], tmp_path / "other", vocab_size=390)
    error = fails(capsys, runs.command(tmp_path / "run", f"data.tokenizer={tmp_path}/other"), 2)
    assert "are not of one tokenizer" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(capsys, runs.command(tmp_path / "run", "train.device=cuda"), 2)
    assert error == "train.device=cuda: torch finds no CUDA GPU here; use train.device=cpu or auto"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", ["seq2seq", "decoder"])
def test_shards_of_the_other_form(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: Any) -> None:
    """Only the shards themselves say whether they are for a model with an encoder."""
    build_mqar(MQARSpec((MQARSetting(16, 2),), vocab_size=64, form=form), [20], tmp_path / "shards")
    source = f"[{{name: recall, kind: mqar, shards: {tmp_path}/shards}}]"
    layers = 0 if form == "seq2seq" else 1
    encoder = ["model.encoder_layers=1", "model.decoder_inject_layers=[0]", "model.ssm.head_dim=16"] if layers else []
    command = runs.command(tmp_path / "run", *encoder, f"data.sources={source}", "data.validation=[]")
    assert fails(capsys, command, 2) == (
        "source 'recall': samples of the seq2seq form go with an encoder, all others without one, "
        f"not with model.encoder_layers={layers}"
    )


# --- disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for the checkpoints of two steps, not of three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def test_full_disk(runs: Runs, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = disk / "run"
    for _ in range(2):  # at once, and when it has resumed
        error = fails(capsys, runs.command(run_dir, *EVERY_STEP), 1)
        assert error == (
            f"cannot write checkpoint {run_dir}/checkpoints/step-00000003: No space left on device; "
            f"the last good one is {run_dir}/checkpoints/step-00000002"
        )
        assert committed(run_dir) == [1, 2]
        assert not list((run_dir / "checkpoints").glob(".*"))

    # No room for a line of metrics.jsonl either, nor for anything at the start.
    with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(4096))
    assert fails(capsys, runs.command(run_dir, *EVERY_STEP), 1) == (
        f"cannot write {run_dir}/recipe.yaml: No space left on device"
    )
    assert committed(run_dir) == [1, 2]

    remount(disk, "size=8m")
    succeeds(runs.command(run_dir, *EVERY_STEP))
    succeeds(runs.command(tmp_path / "whole", *EVERY_STEP))
    assert_same_run(run_dir, tmp_path / "whole")


def test_read_only_disk(runs: Runs, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = disk / "run"
    remount(disk, "size=8m")
    succeeds(runs.command(run_dir, "train.steps=2"))
    remount(disk, "ro")
    error = fails(capsys, runs.command(run_dir, "train.steps=3"), 1)
    assert error == f"{run_dir}/.lock: Read-only file system"
    remount(disk, "rw")
    assert committed(run_dir) == [2]
