"""The training loop, on any number of processes: the same command starts, resumes and, once done, does nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from slotmamba import run_lock
from slotmamba.allocator import keep_freed_memory
from slotmamba.batch import check_data, training_plan
from slotmamba.checkpoint import CheckpointStore, Group
from slotmamba.config import load_recipe, save_recipe
from slotmamba.config.schema import Recipe
from slotmamba.device import compute_precision
from slotmamba.engines import build_engine, check_layout
from slotmamba.environment import describe_environment
from slotmamba.errors import InputError, TrainingError
from slotmamba.evaluate.validation import Validation
from slotmamba.faults import Limits, Watch, keep_flight_record, rank_log, watched
from slotmamba.files import write_json
from slotmamba.global_step import GlobalStep, StepResult
from slotmamba.metrics import MetricsLog
from slotmamba.plots import plot_run
from slotmamba.progress import Progress
from slotmamba.readiness import missing_data
from slotmamba.schedule import learning_rate
from slotmamba.signals import StopFlag
from slotmamba.step_rows import StepRows
from slotmamba.tracking import Tracker
from slotmamba.world import World, joined
from slotmamba_data import PlanReader
from slotmamba_data.files import write_file
from slotmamba_data.prefetch import PrefetchReader
from slotmamba_data.tokenizer_file import find_tokenizer, tokenizer_name

logger = logging.getLogger(__name__)


def train(recipe: Recipe, stop: StopFlag | None = None) -> int:
    """Trains a recipe to its last step, or until `stop` asks it to save and end. Returns the exit code 0.

    Among several processes an exception in one ends all of them (`slotmamba.faults`) and is not raised.

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
    logs, limits = recipe.run_path / "logs", Limits.of(recipe.parallel)
    keep_flight_record(logs)
    with joined(recipe.train.device) as world, watched(world) as watch:
        check_layout(recipe, world.size)
        missing = missing_data(recipe)
        if missing:
            raise InputError("\n".join(missing))
        if world.device.type == "cpu":
            keep_freed_memory()
        with _locked(recipe.run_path, world), rank_log(logs, world):
            watch.begin(logs, limits)
            with closing(Trainer(recipe, world, watch)) as trainer:
                trainer.run(stop)
    return 0


class Trainer:
    """Everything that a run holds, restored from its newest checkpoint when there is one."""

    def __init__(self, recipe: Recipe, world: World, watch: Watch) -> None:
        self.recipe = recipe
        self.world = world
        self.watch = watch
        watch.beat(0, "building the model")
        self.run_dir = recipe.run_path
        self.engine = build_engine(recipe, world)
        watch.engine_built()
        self.train_step = GlobalStep(recipe, self.engine)
        self.steps = StepRows.constant(recipe.rows_per_step)
        self.plan = training_plan(recipe, self.steps)
        self.validation = Validation(recipe)
        check_data(recipe, [self.plan, *self.validation.plans])
        self.store = CheckpointStore(
            self.run_dir,
            recipe.train.checkpoint.keep,
            recipe.model.model_dump(mode="json"),
            Group(world.rank, world.size),
        )
        self.step = 0
        self.reader = PlanReader(self.plan)
        self.labelled_tokens = 0
        self.skipped_documents = 0
        self.skips_in_a_row = 0
        self.validation_due = False  # a validation was given up when the run was asked to stop
        self.tracker_state: dict[str, Any] | None = None
        self.saved: tuple[int, bool] | None = None
        self._resume()
        self.total, self.ended_by = self._total_steps()
        if recipe.data.workers:
            self.reader = PrefetchReader(self.plan, self.reader.samples_consumed, recipe.data.workers)

    def _resume(self) -> None:
        """Goes on from the newest checkpoint, if there is one."""
        self.store.clean()
        found = self.store.load_latest(self.engine.contents())
        if found is None:
            return
        self.step, progress = found
        self.saved = self.step, False
        if not progress:  # a seed checkpoint
            return
        before = StepRows.of(progress["batch_sizes"])
        self.steps = before.resumed(self.step, progress["data"]["samples_consumed"], self.recipe.rows_per_step)
        if len(self.steps.sizes) > 1:
            self.plan.close()
            self.plan = training_plan(self.recipe, self.steps)
        self.reader = PlanReader.from_state(self.plan, progress["data"])
        self.plan = self.reader.plan
        self.labelled_tokens = progress["labelled_tokens"]
        self.skipped_documents = progress["skipped_documents"]
        self.skips_in_a_row = progress["skips_in_a_row"]
        self.validation_due = progress["validation_due"]
        self.tracker_state = progress["tracker"]
        self.saved = self.step, self.validation_due

    def _total_steps(self) -> tuple[int, str | None]:
        """The last step, and the source whose end brings it forward, if one does."""
        recipe, ends = self.recipe, self.plan.ends()
        asked = recipe.train.total_steps
        if recipe.train.tokens is not None:
            rows = -(-recipe.train.tokens // recipe.data.seq_len)
            done = self.steps.steps_within(rows)
            asked = done + (self.steps.first_row(done) < rows)
        if ends is None or ends[0] >= self.steps.first_row(asked):
            return asked, None
        steps = self.steps.steps_within(ends[0])
        if steps < max(1, recipe.optim.warmup):
            raise InputError(
                f"source {ends[1]!r} is exhausted after {steps} steps (on_exhausted=stop), "
                f"too few for a run with optim.warmup={recipe.optim.warmup}"
            )
        return steps, ends[1]

    def run(self, stop: StopFlag) -> None:
        """Trains until all is done or `stop` is set. Where all is done already, nothing in the run folder changes."""
        recipe, total = self.recipe, self.total
        if self.step >= total and not self.validation_due:
            if self.world.is_main:
                print(
                    f"{recipe.name}: already finished, {self.step} steps are done of {total} asked for: {self.run_dir}",
                    flush=True,
                )
            return
        changes = self._changes() if self.world.is_main else []
        with self._records(), Progress(total, self.step, Console(quiet=not self.world.is_main)) as progress:
            progress.message(self._opening())
            if self.ended_by is not None:
                progress.message(f"ends after step {total}, where source {self.ended_by!r} is exhausted")
            if changes:
                progress.message(f"the recipe has changed since the run was last started: {'; '.join(changes)}")
                self._write({"kind": "recipe", "step": self.step, "changes": changes})
            self._loop(total, stop, progress)
            self._save(stop, ending=True)
            if self.step < total or self.validation_due:
                progress.message(
                    f"{stop.requested}: saved at step {self.step} of {total}; the same command resumes: {self.run_dir}"
                )
                return
            progress.message(f"{recipe.name}: finished {total} steps: {self.run_dir}")
            for plot in plot_run(self.run_dir) if self.world.is_main else []:
                progress.message(f"  {plot}")

    def close(self) -> None:
        self.store.abandon()
        self.reader.close()
        self.validation.close()

    @contextmanager
    def _records(self) -> Iterator[None]:
        """The files and sinks that record the run, written by the main process."""
        if not self.world.is_main:
            yield
            return
        save_recipe(self.recipe, self.run_dir / "recipe.yaml")
        if self.recipe.data.tokenizer is not None:
            tokenizer = find_tokenizer(self.recipe.data.tokenizer)
            write_file(self.run_dir / tokenizer_name(tokenizer), tokenizer.read_bytes())
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
        processes = f" of {self.world.size} processes" if self.world.size > 1 else ""
        start = "starts" if self.step == 0 else f"resumes after step {self.step} (row {self.reader.samples_consumed})"
        where = f"on {self.world.device}{processes}"
        return f"{self.recipe.name}: {start}, {self.engine.parameters:,} parameters {where}, {self.run_dir}"

    def _loop(self, total: int, stop: StopFlag, progress: Progress) -> None:
        settings = self.recipe.train
        if self.validation_due:
            self._validate(stop, progress)
        clock, logged_step = time.monotonic(), self.step
        first = True
        while self.step < total and not self._asked_to_stop(stop, "training"):
            with self._saving():
                self.store.poll(lambda written: not self.world.any(not written))
            began = time.monotonic()
            lr = learning_rate(self.recipe.optim, self.step, total)
            result = self.train_step(self.reader, lr)
            self.step += 1
            if first:  # it compiles and fills caches, as no later one does
                self.watch.first_step_done()
                first = False
            else:
                stop.took("step", time.monotonic() - began)
            self.labelled_tokens += result.rows.labelled
            self.skipped_documents += result.rows.skipped
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
                self._save(stop)
                clock, logged_step = time.monotonic(), self.step

    def _asked_to_stop(self, stop: StopFlag, phase: str) -> bool:
        """Whether all processes stop here, where they wait for one another before they go on in `phase`."""
        self.watch.beat(self.step, phase, waiting=True)
        asked = stop.agreed(self.world)
        self.watch.beat(self.step, phase)
        return asked

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

    def _train_record(self, result: StepResult, lr: float, tokens_per_second: float) -> dict[str, Any]:
        return {
            "kind": "train",
            "step": self.step,
            "loss": result.loss,
            **self._by_source(result),
            "balance": result.balance,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "skipped": result.skipped,
            "tokens": self.reader.samples_consumed * self.recipe.data.seq_len,
            "labelled_tokens": self.labelled_tokens,
            "pad_share": 1 - result.rows.valid / self.recipe.train.global_batch_tokens,
            **({"skipped_documents": self.skipped_documents} if self.recipe.data.on_corrupt == "skip" else {}),
            "tokens_per_second": tokens_per_second,
            "time": time.time(),
        }

    def _by_source(self, result: StepResult) -> dict[str, float]:
        """Epochs done of each source that has some; with several also their losses and their shares of all rows."""
        so_far = self.plan.progress(self.reader.samples_consumed)
        values = {f"epochs/{name}": source.epochs for name, source in so_far.items() if source.epochs is not None}
        if len(so_far) > 1:
            values |= {f"loss/{name}": loss for name, loss in result.source_losses.items()}
            values |= {f"share/{name}": source.share for name, source in so_far.items()}
        return values

    def _validate(self, stop: StopFlag, progress: Progress) -> None:
        records = self.validation.run(
            self.engine.model,
            self.world.device,
            self._autocast,
            lambda: self._asked_to_stop(stop, "validation"),
            world=self.world,
        )
        self.validation_due = records is None
        for record in records or []:
            self._log({"kind": "validation", "step": self.step, **record}, progress)

    def _log(self, record: dict[str, Any], progress: Progress) -> None:
        self._write(record)
        progress.update(self.step, record)

    def _write(self, record: dict[str, Any]) -> None:
        if self.world.is_main:
            self.metrics.write(record)
            self.tracker.log(record)

    def _save(self, stop: StopFlag, ending: bool = False) -> None:
        """Saves unless the checkpoint of this very state is there already; at the end of the run one has to be."""
        began = time.monotonic()
        self.watch.beat(self.step, "saving")
        with self._saving():
            self.store.wait()
        if self.saved == (self.step, self.validation_due):
            return
        if self.world.is_main:
            self.metrics.sync()
        progress = {
            "data": self.reader.state(),
            "batch_sizes": self.steps.sizes,
            "labelled_tokens": self.labelled_tokens,
            "skipped_documents": self.skipped_documents,
            "skips_in_a_row": self.skips_in_a_row,
            "validation_due": self.validation_due,
            "tracker": self.tracker.state() if self.world.is_main else None,
        }
        with self._saving(ending):
            self.saved = self.step, self.validation_due
            if self.recipe.train.checkpoint.in_background and not ending:
                self.store.start_saving(self.step, self.engine.contents(), progress)
            else:
                self.store.save(self.step, self.engine.contents(), progress)
        stop.took("save", time.monotonic() - began)

    @contextmanager
    def _saving(self, needed: bool = False) -> Iterator[None]:
        """What the recipe says to do when a checkpoint cannot be written; `needed`: the run must not end without it."""
        try:
            yield
        except OSError as error:
            self.saved = None
            if needed or self.recipe.train.checkpoint.on_error == "stop":
                raise
            if self.world.is_main:
                logger.warning("%s; training goes on (train.checkpoint.on_error=continue)", error.strerror)

    def _autocast(self) -> AbstractContextManager[object]:
        return compute_precision(self.world.device, self.recipe.train.precision)


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@contextmanager
def _locked(run_dir: Path, world: World) -> Iterator[None]:
    """Makes the run folder and holds it for this world: two that train in it would prune each other's checkpoints."""
    with ExitStack() as stack:
        failure: str | None = None
        if world.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((run_dir / run_lock.NAME).open("a"))
            if not run_lock.take(lock):
                failure = f"another process is training in {run_dir}: wait for it or set another run_dir"
        failure = world.broadcast(failure)
        if failure is not None:
            raise InputError(failure)
        yield
