"""Tiny runs: their recipe, what they leave behind, and `slotmamba` as a process that can be sent signals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slotmamba.checkpoint.manifest import committed_steps, read_manifest, step_name
from slotmamba.checkpoint.tensors import read_tensors, stored_tensors
from slotmamba.cli import main
from slotmamba.config import Recipe, load_recipe
from slotmamba.metrics import read_metrics
from tests.forking import Command, Server

# Two sources whose rows have very different numbers of labels, three segments a row, two passes a step.
TINY = """\
name: tiny
model:
  vocab_size: 400
  d_model: 16
  n_heads: 2
  decoder_layers: 2
  slots: {{factors: 2, factor_size: 4, top_k: 2, segment_len: 9}}
data:
  seq_len: 24
  tokenizer: {folder}/tokenizer
  sources:
    - name: recall
      kind: mqar
      mqar: {{vocab_size: 64, settings: [{{length: 8, pairs: 2}}, {{length: 24, pairs: 4}}]}}
    - {{name: text, shards: {folder}/train}}
  validation:
    - name: recall
      kind: mqar
      mqar: {{vocab_size: 64, settings: [{{length: 8, pairs: 2}}, {{length: 24, pairs: 4}}]}}
    - {{name: text, shards: {folder}/val}}
optim: {{lr: 3.0e-3, warmup: 2, min_lr_ratio: 0.1}}
train:
  steps: 10
  device: cpu
  global_batch_tokens: 96
  micro_batch: 2
  log_every: 1
  eval_every: 4
  eval_rows: 4
  checkpoint: {{every: 3}}
"""

CLOCK = ("time", "tokens_per_second")


class Runs:
    """Runs of the recipe above on the data in `folder`, where its file `tiny.yaml` is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "tiny.yaml"
        self.file.write_text(TINY.format(folder=folder))

    def recipe(self, run_dir: Path, *overrides: str) -> Recipe:
        return load_recipe(self.file, [f"run_dir={run_dir}", *overrides])

    def command(self, run_dir: Path, *overrides: str) -> list[str]:
        """Arguments of `slotmamba` that train the same."""
        return ["train", str(self.file), f"run_dir={run_dir}", *overrides]


def records(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """metrics.jsonl, or its records of a kind, without what depends on the clock."""
    return [
        {key: value for key, value in record.items() if key not in CLOCK}
        for record in read_metrics(run_dir / "metrics.jsonl")
        if kind in (None, record["kind"])
    ]


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / step_name(step)


def committed(run_dir: Path) -> list[int]:
    return committed_steps(run_dir / "checkpoints")


def tensors(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Weights and optimizer states of a checkpoint."""
    folder = checkpoint(run_dir, step)
    values = {name: torch.empty_like(tensor, device="cpu") for name, tensor in stored_tensors(folder).items()}
    read_tensors(folder, values)
    return values


def assert_same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Equal in every bit."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert tensor.numpy().tobytes() == right[name].numpy().tobytes(), name


def assert_same_run(run_dir: Path, uninterrupted: Path) -> None:
    """The same records in the same order, and the same last checkpoint, bit for bit."""
    assert records(run_dir) == records(uninterrupted)
    last = committed(uninterrupted)[-1]
    assert committed(run_dir)[-1] == last
    assert_same_tensors(tensors(run_dir, last), tensors(uninterrupted, last))
    mine, theirs = (read_manifest(checkpoint(folder, last)) for folder in (run_dir, uninterrupted))
    assert (mine.progress, mine.updates) == (theirs.progress, theirs.updates)


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> str:
    """Runs a command, in this process, that ends with `code` and one line on stderr; returns it without `error: `."""
    capsys.readouterr()
    assert main(arguments) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ").rstrip("\n")


def succeeds(arguments: list[str]) -> None:
    """Runs a command, in this process, that ends with 0."""
    assert main(arguments) == 0


class Commands:
    """Starts `slotmamba` processes: by default forked from a server that has imported it, which saves seconds."""

    def __init__(self, folder: Path) -> None:
        self._server = Server("tests.train.command_server", folder)

    def start(self, arguments: list[str]) -> Command:
        return self._server.start(arguments)

    def start_anew(self, arguments: list[str]) -> Command:
        """The installed command in a fresh interpreter, as a user starts it."""
        output = self._server.output()
        with output.open("w") as out, output.with_suffix(".err").open("w") as err:
            process = subprocess.Popen(
                [Path(sys.executable).with_name("slotmamba"), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        return Command(process.pid, process.poll, output)

    def run(self, arguments: list[str]) -> Command:
        command = self.start(arguments)
        command.wait()
        return command

    def close(self) -> None:
        self._server.close()
