"""Worlds of real processes with gloo: started one by one, as `srun` does, or by torchrun."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from slotmamba.metrics import read_metrics
from tests.forking import ROOT, Command, Server

# Recall alone, which needs no shards.
RECIPE = """\
name: tiny
model:
  vocab_size: 64
  d_model: 16
  n_heads: 2
  decoder_layers: 2
  slots: {factors: 2, factor_size: 4, top_k: 2, segment_len: 9}
data:
  seq_len: 24
  sources: [{name: recall, kind: mqar, mqar: {vocab_size: 64, settings: [{length: 8, pairs: 2}]}}]
  validation: [{name: recall, kind: mqar, mqar: {vocab_size: 64, settings: [{length: 8, pairs: 2}]}}]
optim: {lr: 3.0e-3, warmup: 2}
parallel: {engine: fsdp2, shard: 2}
train:
  steps: 6
  device: cpu
  global_batch_tokens: 96
  micro_batch: 2
  log_every: 1
  eval_every: 100
  eval_rows: 8
  checkpoint: {every: 100}
"""


class Job:
    """A world of `slotmamba train` processes."""

    def __init__(self, ranks: list[Command], run_dir: Path) -> None:
        self.ranks = ranks
        self.run_dir = run_dir

    def wait(self, ranks: list[int] | None = None, seconds: float = 90) -> list[int]:
        """The exit codes of these ranks, all by default; a rank that still runs after `seconds` fails the test."""
        deadline = time.monotonic() + seconds
        codes = []
        for rank in ranks if ranks is not None else range(len(self.ranks)):
            self.until(partial(_ended, self.ranks[rank]), deadline - time.monotonic())
            codes.append(self.ranks[rank].wait())
        return codes

    def until(self, happened: Callable[[], object], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, f"not within the time: {self.out}{self.err}"
            time.sleep(0.02)

    def steps(self) -> int:
        """Steps in metrics.jsonl so far."""
        path = self.run_dir / "metrics.jsonl"
        records = read_metrics(path) if path.exists() else []
        return sum(record["kind"] == "train" for record in records)

    def log(self, rank: int) -> str:
        return (self.run_dir / "logs" / f"rank-{rank:05d}.log").read_text()

    def stacks(self, rank: int) -> str:
        return (self.run_dir / "logs" / f"stacks-{rank:05d}.txt").read_text()

    @property
    def out(self) -> str:
        return "".join(rank.out for rank in self.ranks)

    @property
    def err(self) -> str:
        """The terminal's errors, without what native libraries of ranks say before they have a log."""
        return "".join(rank.err for rank in self.ranks)

    def errors(self) -> list[str]:
        """The lines of ours on standard error."""
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]

    def end(self) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                os.kill(rank.pid, signal.SIGKILL)
                rank.wait()


class Launcher:
    """Starts jobs: ranks forked from a server that has imported everything, or torchrun."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(RECIPE)
        self._jobs: list[Job] = []
        self._server = Server("tests.distributed.rank_server", folder)

    def start(self, run_dir: Path, *overrides: str, inject: str = "", size: int = 2, rows: Path | None = None) -> Job:
        """`size` ranks, each a command of its own; `rows`: a folder in which to note what they train on."""
        port = free_port()
        ranks = []
        for rank in range(size):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1",
                         "MASTER_PORT": port, "INJECT": inject, **({"ROWS": rows} if rows else {})}  # fmt: skip
            environment = {name: str(value) for name, value in variables.items()}
            ranks.append(self._server.start(self.command(run_dir, *overrides), environment))
        return self._started(Job(ranks, run_dir))

    def torchrun(self, run_dir: Path, *overrides: str, inject: str = "", size: int = 2) -> Job:
        """One process: torchrun, whose exit code and output are the job's."""
        output = self._server.output()
        with output.open("w") as out, output.with_suffix(".err").open("w") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}",
                 "-m", "tests.distributed.injected", *self.command(run_dir, *overrides)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=ROOT, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "INJECT": inject},
            )  # fmt: skip
        return self._started(Job([Command(process.pid, process.poll, output)], run_dir))

    def command(self, run_dir: Path, *overrides: str) -> list[str]:
        return ["train", str(self.recipe), f"run_dir={run_dir}", *overrides]

    def end_jobs(self) -> None:
        while self._jobs:
            self._jobs.pop().end()

    def close(self) -> None:
        self._server.close()

    def _started(self, job: Job) -> Job:
        self._jobs.append(job)
        return job


def _ended(command: Command) -> bool:
    return command.poll() is not None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
