"""What goes wrong is one clear line, exit code 1 or 2, and loses nothing that was committed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slotmamba_data import MQARSetting, MQARSpec, build_mqar, train_tokenizer
from tests.train.runs import Runs, assert_same_run, committed, fails, succeeds

pytestmark = [pytest.mark.usefixtures("without_plots"), pytest.mark.timeout(300)]

EVERY_STEP = ["train.checkpoint.every=1", "train.checkpoint.keep=20", "train.steps=5"]


@pytest.fixture(scope="module")
def two_steps(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_steps")
    shutil.copytree(runs.folder, folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slotmamba.train.plot_run", lambda run_dir: [])
        succeeds(["train", *own(folder), "train.steps=2"])
    return folder


@pytest.fixture
def started(two_steps: Path, tmp_path: Path) -> Path:
    """A run with data of its own, two of four steps done."""
    return shutil.copytree(two_steps, tmp_path / "own")


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
    return f"data.sources.1.shards: {folder}/data/train does not exist: build it with"


def remove_tokenizer(folder: Path) -> str:
    shutil.rmtree(folder / "data" / "tokenizer")
    return f"data.tokenizer: there is no tokenizer {folder}/data/tokenizer: make one with"


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


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file, but for the logs, which say what was tried."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.parent.name != "logs"}


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
        ("data.packing=best_fit", "the data are not those of the saved run; changed: source text: packing (was concat, "
         "is best_fit). Resume with the same data, or start a new run"),
        ("model.vocab_size=300", "model.vocab_size=300, but the data have tokens up to 379: set it to 380 or more"),
        ("run_dir={data}/tiny.yaml", "{data}/tiny.yaml: File exists"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_run(
    started: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    places = {"run": started / "run", "data": started / "data"}
    before = contents(started / "run")
    assert fails(capsys, ["train", *own(started), override.format(**places)], 2) == message.format(**places)
    assert contents(started / "run") == before


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
    error = fails(capsys, runs.command(run_dir, *EVERY_STEP), 1)
    assert error == f"{run_dir}/recipe.yaml: No space left on device"
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
