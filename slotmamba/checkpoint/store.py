"""Checkpoints of a run: saved so that a crash at any moment loses at most the one being written.

All processes of the world save and load together. Each writes its part into one temporary folder (see `folder`); when
all parts are synced the main process writes the manifest and gives the folder its name. An error of any process is the
same error in all of them, and the checkpoints before stay as they were.

No state of a random number generator is stored: a training step draws from none. The rows of a step are a function of
the seed and the row's number in the global order, the initial weights of the seed and the parameter's name.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from slotmamba.checkpoint.contents import Contents, Snapshot, Written
from slotmamba.checkpoint.folder import CheckpointFolder
from slotmamba.checkpoint.group import Group
from slotmamba.checkpoint.manifest import (
    FORMAT,
    FileRecord,
    Manifest,
    list_files,
    read_manifest,
    verify_files,
    write_manifest,
)
from slotmamba.checkpoint.newest import load_newest
from slotmamba.errors import InputError, SlotMambaError


@dataclass(frozen=True)
class _Draft:
    """A checkpoint before it is written."""

    step: int
    engine: Literal["single", "fsdp2", "deepspeed"]
    zero_stage: int | None
    snapshot: Snapshot
    progress: dict[str, Any]


@dataclass(frozen=True)
class _InFlight:
    """A checkpoint that a thread is writing; its result is the temporary folder."""

    step: int
    written: Future[Path]


class CheckpointStore:
    """The checkpoints of one run. Every method is a collective of the processes of ``group``."""

    def __init__(self, run_dir: Path, keep: int, model_config: dict[str, Any], group: Group | None = None) -> None:
        """
        Args:
            run_dir: The run's folder; ``checkpoints`` in it is created with the first save.
            keep: Committed checkpoints to keep. The newest one with finite values stays even when it is older.
            model_config: The recipe's model section as JSON; a checkpoint with another one is refused.
            group: The processes that train together; this one alone by default.
        """
        self.group = group or Group()
        self.folder = CheckpointFolder(run_dir / "checkpoints", keep)
        # As it comes back from a manifest: tuples are lists there.
        self.model_config = json.loads(json.dumps(model_config))
        self._in_flight: _InFlight | None = None
        self._buffers: dict[str, Tensor] = {}

    def committed(self) -> list[int]:
        """Steps of the complete checkpoints in ascending order."""
        return self.group.on_main(self.folder.committed)

    def clean(self) -> None:
        """Tidy up after processes that died, at the start of a run; see `CheckpointFolder.clean`."""
        self.group.on_main(self.folder.clean)

    def save(self, step: int, contents: Contents, progress: dict[str, Any]) -> Path:
        """Save everything that the run needs to go on after ``step`` steps, and prune older checkpoints.

        Args:
            progress: The caller's own state as JSON, that of the main process counts; `load` returns it.

        Returns:
            The checkpoint's folder. One that was there for the same step is replaced.

        Raises:
            OSError: it could not be written (disk full, read-only); one line with path and last good checkpoint. Or
                that of a save in the background before it.
            SlotMambaError: what is on disk is not what was in memory, or did not change since the checkpoint before.
            ValueError, TypeError: ``progress`` is not JSON.
        """
        self.wait()
        draft = _Draft(step, contents.engine, contents.zero_stage, contents.snapshot(), progress)
        return self._explained(step, lambda: self._commit(self._write(draft), step))

    def start_saving(self, step: int, contents: Contents, progress: dict[str, Any]) -> None:
        """`save` in the background: returns when the tensors are copied to the CPU, while a thread writes them.

        The checkpoint counts after the first `poll` that finds it written, or `wait`; one that is still being written
        is waited for. Errors as for `save`, of the save before it.
        """
        self.wait()
        snapshot = contents.snapshot().staged(self._buffers)
        draft = _Draft(step, contents.engine, contents.zero_stage, snapshot, progress)
        written: Future[Path] = Future()

        def write() -> None:
            try:
                written.set_result(self._write(draft))
            except BaseException as error:  # it is raised where the result is asked for
                written.set_exception(error)

        self._in_flight = _InFlight(step, written)
        # A daemon: a process that has to end does not stay for a thread that waits for a process that is gone.
        threading.Thread(target=write, name=f"checkpoint of step {step}", daemon=True).start()

    def poll(self, everywhere: Callable[[bool], bool]) -> int | None:
        """Commit the checkpoint that was being written in the background if all processes have written it.

        Args:
            everywhere: Whether a flag is set in all processes; called only while there is one being written.

        Returns:
            The step that was committed, if any.

        Raises:
            As `save`, for what failed in the background.
        """
        if self._in_flight is None or not everywhere(self._in_flight.written.done()):
            return None
        return self.wait()

    def wait(self) -> int | None:
        """Wait for what is being written in the background and commit it; returns and raises as `poll` does."""
        if self._in_flight is None:
            return None
        step, written = self._in_flight.step, self._in_flight.written
        self._in_flight = None
        self._explained(step, lambda: self._commit(written.result(), step))
        return step

    def abandon(self) -> None:
        """Not a collective, for a process that ends with an error: let the thread finish, commit what is complete.

        What goes wrong here is not worth hiding that error for; `clean` commits or deletes the folder later.
        """
        if self._in_flight is None:
            return
        step, written = self._in_flight.step, self._in_flight.written
        self._in_flight = None
        if written.exception() is None and self.group.is_main:
            self.folder.commit(written.result(), step)

    def load(self, step: int, contents: Contents) -> dict[str, Any]:
        """Restore model and optimizer from the checkpoint of ``step``, of any world size; returns its progress.

        Raises:
            DamagedCheckpointError: a file is missing or differs from what was written.
            InputError: it is a checkpoint of another model or of an engine whose files this one cannot read.
        """
        folder = self.folder.checkpoint(step)
        manifest = self.group.on_main(lambda: read_manifest(folder))
        self._check_config(manifest, folder)
        _check_engine(manifest, contents, folder)
        self.group.together(lambda: verify_files(folder, manifest, self.group.rank, self.group.size))
        contents.read(folder, manifest, self.group)
        return manifest.progress

    def load_latest(self, contents: Contents) -> tuple[int, dict[str, Any]] | None:
        """Restore the newest checkpoint that is not damaged; a warning names each damaged one that it skips.

        Returns:
            Step and progress; None when there is no checkpoint.

        Raises:
            SlotMambaError: there are checkpoints, but each of them is damaged.
            InputError: the newest is a checkpoint of another model or engine.
        """
        return load_newest(self.folder.path, lambda step: self.load(step, contents), self.group)

    def _write(self, draft: _Draft) -> Path:
        """A whole checkpoint in a temporary folder, manifest last, everything synced; no folder if that fails."""
        temporary = self.group.on_main(lambda: self.folder.make_temporary(draft.step))
        try:
            written = draft.snapshot.write(temporary, self.group)
            files = self._record_files(temporary)
            self.group.on_main(lambda: self._write_manifest(temporary, draft, written, files))
        except BaseException:
            if self.group.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return temporary

    def _record_files(self, temporary: Path) -> dict[str, FileRecord]:
        """Each process reads its share."""
        names = self.group.on_main(lambda: list_files(temporary))
        share = names[self.group.rank :: self.group.size]
        records = self.group.together(lambda: {name: FileRecord.of(temporary / name) for name in share})
        return {name: records[number % self.group.size][name] for number, name in enumerate(names)}

    def _write_manifest(self, temporary: Path, draft: _Draft, written: Written, files: dict[str, FileRecord]) -> None:
        manifest = Manifest(
            format=FORMAT,
            step=draft.step,
            updates=draft.snapshot.updates,
            finite=written.finite,
            engine=draft.engine,
            zero_stage=draft.zero_stage,
            world_size=self.group.size,
            model=self.model_config,
            progress=draft.progress,
            aliases=draft.snapshot.aliases,
            files=files,
            tensors=written.tensors,
            torch=torch.__version__,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._check_progress(manifest)
        write_manifest(temporary, manifest)

    def _check_progress(self, manifest: Manifest) -> None:
        """Where the optimizer made updates since the last checkpoint, the tensors must have changed (NaN does not)."""
        before = [step for step in self.folder.committed() if step < manifest.step]
        if not before:
            return
        previous = read_manifest(self.folder.checkpoint(before[-1]))
        updated = manifest.updates != previous.updates
        if updated and manifest.finite and manifest.tensors == previous.tensors:
            raise SlotMambaError(
                f"the weights at step {manifest.step} are those of the checkpoint of step {previous.step}, "
                f"though the optimizer has made {manifest.updates - previous.updates} updates"
            )

    def _commit(self, temporary: Path, step: int) -> Path:
        return self.group.on_main(lambda: self.folder.commit(temporary, step))

    def _explained(self, step: int, save: Callable[[], Path]) -> Path:
        """What `save` returns, after pruning; an OSError of it names the checkpoint and the last good one."""
        try:
            final = save()
        except OSError as error:
            failure = error
            raise self.group.on_main(lambda: self.folder.save_error(step, failure)) from error
        self.group.on_main(lambda: self.folder.prune(step))
        return final

    def _check_config(self, manifest: Manifest, folder: Path) -> None:
        differences = _differences(manifest.model, self.model_config, "model")
        if differences:
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise InputError(f"{folder} is of another model: {', '.join(differences[:3])}{more}")


def _check_engine(manifest: Manifest, contents: Contents, folder: Path) -> None:
    """Refuse files that the engine cannot read."""
    by_zero = manifest.engine == "deepspeed"
    if by_zero and contents.engine == "deepspeed" and manifest.zero_stage != contents.zero_stage:
        raise InputError(
            f"{folder} was saved by ZeRO stage {manifest.zero_stage}: set parallel.zero_stage={manifest.zero_stage}"
        )
    # Before the first update there are weights only, which any engine reads.
    readable = manifest.updates == 0 and not by_zero
    if by_zero != (contents.engine == "deepspeed") and not readable:
        raise InputError(
            f"{folder} was saved by parallel.engine={manifest.engine}, whose files {contents.engine} cannot read: "
            f"set parallel.engine={manifest.engine}"
        )


def _differences(there: Any, here: Any, key: str) -> list[str]:
    """Keys in which two JSON values differ, with both values."""
    if isinstance(there, dict) and isinstance(here, dict):
        names = [*there, *(name for name in here if name not in there)]
        nested = (_differences(there.get(name), here.get(name), f"{key}.{name}") for name in names)
        return [difference for differences in nested for difference in differences]
    return [] if there == here else [f"{key} is {json.dumps(there)} there and {json.dumps(here)} here"]
