"""Tiny runs: their recipe, what they leave behind, and `slotmamba` as a process that can be sent signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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


class Command:
    """A `slotmamba` process."""

    def __init__(self, pid: int, poll: Callable[[], int | None], output: Path) -> None:
        self.pid = pid
        self._poll = poll
        self._output = output
        self.code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, minus the signal that ended it; None while it runs."""
        if self.code is None:
            self.code = self._poll()
        return self.code

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    def wait_until(self, happened: Callable[[], object]) -> bool:
        """Returns once something has happened, or False once the process has ended without it."""
        while not happened():
            if self.poll() is not None:
                return bool(happened())
            time.sleep(0.002)
        return True

    def send(self, number: signal.Signals) -> None:
        """Send a signal; a process that has ended gets none."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def out(self) -> str:
        return self._output.read_text()

    @property
    def err(self) -> str:
        return self._output.with_suffix(".err").read_text()


class Commands:
    """Starts `slotmamba` processes: by default forked from a server that has imported it, which saves seconds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started = 0
        self._server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("command_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def start(self, arguments: list[str]) -> Command:
        output = self._next_output()
        pid = self._request("start", arguments, str(output), str(output.with_suffix(".err")))
        return Command(pid, lambda: self._request("poll", pid), output)

    def start_anew(self, arguments: list[str]) -> Command:
        """The installed command in a fresh interpreter, as a user starts it."""
        output = self._next_output()
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
        self._server.communicate()

    def _next_output(self) -> Path:
        self._started += 1
        output = self._folder / f"{self._started}.out"
        output.touch()
        output.with_suffix(".err").touch()
        return output

    def _request(self, *request: object) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())
