"""The training loop, one process, CPU or GPU: the same command starts, resumes and, once done, does nothing."""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slotmamba.allocator import keep_freed_memory
from slotmamba.batch import Batch, check_data, labelled, plan_source
from slotmamba.checkpoint import CheckpointStore
from slotmamba.config import load_recipe, save_recipe
from slotmamba.config.schema import Recipe
from slotmamba.device import choose_device, compute_precision
from slotmamba.environment import describe_environment
from slotmamba.errors import InputError, TrainingError
from slotmamba.evaluate.validation import Validation
from slotmamba.files import write_json
from slotmamba.metrics import MetricsLog
from slotmamba.models import build_model
from slotmamba.optim import build_optimizer, gradient_norm, scale_gradients
from slotmamba.plots import plot_run
from slotmamba.progress import Progress
from slotmamba.readiness import missing_data
from slotmamba.schedule import learning_rate
from slotmamba.signals import StopFlag
from slotmamba.tracking import Tracker
from slotmamba_data import PlanReader, Row, Tokenizer, open_plan
from slotmamba_data.files import write_file
from slotmamba_data.tokenizer_file import MODEL_NAME

logger = logging.getLogger(__name__)


def train(recipe: Recipe, stop: StopFlag | None = None) -> int:
    """Trains a recipe to its last step, or until SIGINT or SIGTERM asks it to save and stop. Returns the exit code 0.

    Args:
        recipe: what to train.
        stop: a flag that is entered already, so that a signal counts from before this module was imported.

    Raises:
        InputError: the recipe asks for something that is not there (a GPU, shards), or its data or model are not those
            of the checkpoint in its run folder.
        TrainingError: the loss or gradient is not finite and the recipe says to stop.
        OSError: the run folder cannot be written; the checkpoints before are untouched.
    """
    if stop is None:
        with StopFlag() as stop:
            return train(recipe, stop)
    device = choose_device(recipe.train.device, "train.device")
    missing = missing_data(recipe)
    if missing:
        raise InputError("\n".join(missing))
    if device.type == "cpu":
        keep_freed_memory()
    run_dir = recipe.run_path
    run_dir.mkdir(parents=True, exist_ok=True)
    with _locked(run_dir), closing(Trainer(recipe, device)) as trainer:
        trainer.run(stop)
    return 0


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean loss in nats a labelled token, the same by source, gradient norm before clipping."""

    loss: float
    source_losses: dict[str, float]
    balance: float
    grad_norm: float
    skipped: bool


class Trainer:
    """Everything that a run holds, restored from its newest checkpoint when there is one."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        self.run_dir = recipe.run_path
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe.model).to(device)
        self.model.save_memory(recipe.train.activation_checkpointing, recipe.train.sequence_chunks)
        self.optimizer = build_optimizer(self.model, recipe.optim)
        self.plan = open_plan([plan_source(source) for source in recipe.data.sources], recipe.data.seq_len, recipe.seed)
        self.validation = Validation(recipe)
        check_data(recipe, [self.plan, *self.validation.plans])
        self.store = CheckpointStore(self.run_dir, recipe.train.checkpoint.keep, recipe.model.model_dump(mode="json"))
        self.step = 0
        self.reader = PlanReader(self.plan)
        self.labelled_tokens = 0
        self.skips_in_a_row = 0
        self.validation_due = False  # a validation was given up when the run was asked to stop
        self.tracker_state: dict[str, Any] | None = None
        self.saved: tuple[int, bool] | None = None
        self._resume()

    def _resume(self) -> None:
        """Goes on from the newest checkpoint, if there is one."""
        self.store.clean()
        found = self.store.load_latest(self.model, self.optimizer)
        if found is None:
            return
        self.step, progress = found
        self.reader = PlanReader.from_state(self.plan, progress["data"])
        self.labelled_tokens = progress["labelled_tokens"]
        self.skips_in_a_row = progress["skips_in_a_row"]
        self.validation_due = progress["validation_due"]
        self.tracker_state = progress["tracker"]
        self.saved = self.step, self.validation_due

    def run(self, stop: StopFlag) -> None:
        """Trains until all is done or `stop` is set. Where all is done already, nothing in the run folder changes."""
        recipe, total = self.recipe, self.recipe.train.total_steps
        if self.step >= total and not self.validation_due:
            print(
                f"{recipe.name}: already finished, {self.step} steps are done of {total} asked for: {self.run_dir}",
                flush=True,
            )
            return
        changes = self._changes()
        with self._records(), Progress(total, self.step) as progress:
            progress.message(self._opening())
            if changes:
                progress.message(f"the recipe has changed since the run was last started: {'; '.join(changes)}")
                self.metrics.write({"kind": "recipe", "step": self.step, "changes": changes})
            self._loop(total, stop, progress)
            self._save()
            if self.step < total or self.validation_due:
                progress.message(
                    f"{stop.requested}: saved at step {self.step} of {total}; the same command resumes: {self.run_dir}"
                )
                return
            plots = plot_run(self.run_dir)
            progress.message(f"{recipe.name}: finished {total} steps: {self.run_dir}")
            for plot in plots:
                progress.message(f"  {plot}")

    def close(self) -> None:
        self.plan.close()
        self.validation.close()

    @contextmanager
    def _records(self) -> Iterator[None]:
        """The files and sinks that record the run."""
        save_recipe(self.recipe, self.run_dir / "recipe.yaml")
        if self.recipe.data.tokenizer is not None:
            write_file(self.run_dir / MODEL_NAME, Tokenizer(self.recipe.data.tokenizer).path.read_bytes())
        write_json(self.run_dir / "environment.json", describe_environment())
        with closing(MetricsLog(self.run_dir / "metrics.jsonl")) as self.metrics:
            self.metrics.truncate_after(self.step, repeated="validation" if self.validation_due else None)
            with closing(Tracker(self.recipe, self.run_dir, self.tracker_state)) as self.tracker:
                yield

    def _changes(self) -> list[str]:
        """What the recipe says otherwise than the one that the checkpoint was trained with."""
        saved = self.run_dir / "recipe.yaml"
        if self.step == 0 or not saved.is_file():
            return []
        before, now = (_flat(each.model_dump(mode="json")) for each in (load_recipe(saved), self.recipe))
        keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        return [f"{key} was {before.get(key)}, is {now.get(key)}" for key in keys if key != "run_dir"]

    def _opening(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        start = "starts" if self.step == 0 else f"resumes after step {self.step} (row {self.reader.samples_consumed})"
        return f"{self.recipe.name}: {start}, {parameters:,} parameters on {self.device}, {self.run_dir}"

    def _loop(self, total: int, stop: StopFlag, progress: Progress) -> None:
        settings = self.recipe.train
        if self.validation_due:
            self._validate(stop, progress)
        clock, logged_step = time.monotonic(), self.step
        while self.step < total and not stop:
            lr = learning_rate(self.recipe.optim, self.step, total)
            result = self._train_step(lr)
            self.step += 1
            self._check_skips(result)
            last = self.step == total
            if self.step % settings.log_every == 0 or last or result.skipped:
                seconds = time.monotonic() - clock
                tokens_per_second = (self.step - logged_step) * settings.global_batch_tokens / seconds
                self._log(self._train_record(result, lr, tokens_per_second), progress)
                clock, logged_step = time.monotonic(), self.step
            if self.step % settings.eval_every == 0 or last:
                self._validate(stop, progress)
                clock, logged_step = time.monotonic(), self.step
            if self.step % settings.checkpoint.every == 0 and not last:
                self._save()
                clock, logged_step = time.monotonic(), self.step

    def _train_step(self, lr: float) -> StepResult:
        """One optimizer step on the next global batch, unless loss or gradient are not finite."""
        rows = self.reader.next_batch(self.recipe.rows_per_step)
        tokens = labelled(rows)
        if tokens == 0:
            raise TrainingError(f"step {self.step + 1}: no position of the batch has a label")
        self.optimizer.zero_grad(set_to_none=True)
        nats = torch.zeros(len(self.plan.sources), dtype=torch.float64, device=self.device)
        counts = torch.zeros_like(nats)
        balance = torch.zeros((), device=self.device)
        for micro in self._micro_batches(rows):
            with self._autocast():
                losses = self.model.losses(**micro.arguments())
            share = len(micro.input_ids) / len(rows)
            (
                (losses.nll.sum() + self.recipe.optim.z_loss * losses.z.sum()) / tokens
                + self.recipe.model.slots.balance * share * losses.balance
            ).backward()
            source = micro.source[losses.row]
            nats.index_add_(0, source, losses.nll.detach().double())
            counts.index_add_(0, source, torch.ones_like(losses.nll, dtype=torch.float64))
            balance += share * losses.balance.detach()

        norm = gradient_norm(self.model.parameters())
        finite = bool(torch.isfinite(nats.sum()) & torch.isfinite(norm))
        if finite:
            scale_gradients(self.model.parameters(), norm, self.recipe.optim.clip_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.labelled_tokens += tokens
        return StepResult(
            loss=float(nats.sum() / tokens),
            source_losses=self._by_source(nats, counts),
            balance=float(balance),
            grad_norm=float(norm),
            skipped=not finite,
        )

    def _check_skips(self, result: StepResult) -> None:
        """Stops at a loss or gradient that is not finite, or counts it, as the recipe says."""
        self.skips_in_a_row = self.skips_in_a_row + 1 if result.skipped else 0
        if not result.skipped:
            return
        what = f"step {self.step}: loss {result.loss}, gradient norm {result.grad_norm}; the weights were not changed"
        if self.recipe.train.on_nonfinite == "stop":
            raise TrainingError(f"{what}. Resume from an earlier checkpoint, or set train.on_nonfinite=skip")
        if self.skips_in_a_row >= self.recipe.train.max_skips:
            raise TrainingError(f"{what}. {self.skips_in_a_row} steps in a row were skipped (train.max_skips)")
        logger.warning("%s, step skipped", what)

    def _micro_batches(self, rows: list[Row]) -> Iterator[Batch]:
        for start in range(0, len(rows), self.recipe.train.micro_batch):
            yield Batch.of(rows[start : start + self.recipe.train.micro_batch], self.device)

    def _by_source(self, nats: Tensor, counts: Tensor) -> dict[str, float]:
        return {
            source.name: float(total / count)
            for source, total, count in zip(self.plan.sources, nats.cpu(), counts.cpu(), strict=True)
            if count > 0
        }

    def _train_record(self, result: StepResult, lr: float, tokens_per_second: float) -> dict[str, Any]:
        by_source = {f"loss/{name}": loss for name, loss in result.source_losses.items()}
        return {
            "kind": "train",
            "step": self.step,
            "loss": result.loss,
            **(by_source if len(self.plan.sources) > 1 else {}),
            "balance": result.balance,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "skipped": result.skipped,
            "tokens": self.reader.samples_consumed * self.recipe.data.seq_len,
            "labelled_tokens": self.labelled_tokens,
            "tokens_per_second": tokens_per_second,
            "time": time.time(),
        }

    def _validate(self, stop: StopFlag, progress: Progress) -> None:
        records = self.validation.run(self.model, self.device, self._autocast, stop.__bool__)
        self.validation_due = records is None
        for record in records or []:
            self._log({"kind": "validation", "step": self.step, **record}, progress)

    def _log(self, record: dict[str, Any], progress: Progress) -> None:
        self.metrics.write(record)
        self.tracker.log(record)
        progress.update(self.step, record)

    def _save(self) -> None:
        """Saves unless the checkpoint of this very state is there already."""
        if self.saved == (self.step, self.validation_due):
            return
        self.metrics.sync()
        progress = {
            "data": self.reader.state(),
            "labelled_tokens": self.labelled_tokens,
            "skips_in_a_row": self.skips_in_a_row,
            "validation_due": self.validation_due,
            "tracker": self.tracker.state(),
        }
        self.store.save(self.step, self.model, self.optimizer, progress)
        self.saved = self.step, self.validation_due

    def _autocast(self) -> AbstractContextManager[object]:
        return compute_precision(self.device, self.recipe.train.precision)


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Holds the run folder for this process: two that train in it would prune each other's checkpoints."""
    with (run_dir / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is training in {run_dir}: wait for it or set another run_dir") from None
        yield
