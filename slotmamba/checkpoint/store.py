"""Checkpoints of a run: saved so that a crash at any moment loses at most the one being written.

A checkpoint is ``RUN_DIR/checkpoints/step-00000100``. It is written to ``.tmp-step-00000100-PID``, every file synced,
the manifest last, and renamed. A folder without an intact manifest is not a checkpoint. What is thrown away is first
renamed to ``.old-step-00000100-PID``, and of its files the manifest goes first.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slotmamba.checkpoint import state
from slotmamba.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    DamagedCheckpointError,
    Manifest,
    committed_steps,
    is_intact,
    read_manifest,
    record_files,
    step_name,
    verify_files,
    write_manifest,
)
from slotmamba.checkpoint.newest import load_newest
from slotmamba.checkpoint.rng import rng_state, set_rng_state
from slotmamba.checkpoint.tensors import (
    all_finite,
    digests,
    read_digests,
    read_tensors,
    sample,
    stored_tensors,
    write_tensors,
)
from slotmamba.errors import InputError, SlotMambaError
from slotmamba.files import write_json
from slotmamba_data.files import sync_folder

logger = logging.getLogger(__name__)

_RNG = "rng.json"


class CheckpointStore:
    """The checkpoints of one run. Whoever writes holds the run's folder (`slotmamba.train` locks it)."""

    def __init__(self, run_dir: Path, keep: int, model_config: dict[str, Any]) -> None:
        """
        Args:
            run_dir: The run's folder; ``checkpoints`` in it is created with the first save.
            keep: Committed checkpoints to keep. The newest one with finite values stays even when it is older.
            model_config: The recipe's model section as JSON; a checkpoint with another one is refused.
        """
        assert keep >= 1
        self.folder = run_dir / "checkpoints"
        self.keep = keep
        # As it comes back from a manifest: tuples are lists there.
        self.model_config = json.loads(json.dumps(model_config))

    def committed(self) -> list[int]:
        """Steps of the complete checkpoints in ascending order."""
        return committed_steps(self.folder)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return max(self.committed(), default=None)

    def clean(self) -> None:
        """Tidy up after processes that died, at the start of a run.

        Nobody else writes here, so every temporary folder was left behind, even if its number is that of another
        process by now. One with an intact manifest is complete and only lacks its name: it gets it. All others go.
        """
        for path in sorted(self.folder.glob(".*")):
            match = re.fullmatch(r"\.(tmp|old)-step-(\d+)-\d+", path.name)
            if match is None:
                continue
            step = int(match[2])
            if match[1] == "tmp" and is_intact(path) and step not in self.committed():
                self._commit(path, step)
            else:
                shutil.rmtree(path)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> Path:
        """Save everything that the run needs to go on after ``step`` steps, and prune older checkpoints.

        Args:
            progress: The caller's own state as JSON; `load` returns it.

        Returns:
            The checkpoint's folder. One that was there for the same step is replaced.

        Raises:
            OSError: it could not be written (disk full, read-only); one line with path and last good checkpoint.
            SlotMambaError: what is on disk is not what was in memory, or did not change since the checkpoint before.
            ValueError, TypeError: ``progress`` is not JSON.
        """
        temporary = self.folder / f".tmp-{step_name(step)}-{os.getpid()}"
        try:
            try:
                self._write(temporary, step, model, optimizer, progress)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            final = self._commit(temporary, step)
        except OSError as error:
            raise self._save_error(step, error) from error
        self._prune(step)
        return final

    def load(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Restore model, optimizer and random states from the checkpoint of ``step``; returns its progress.

        Raises:
            DamagedCheckpointError: a file is missing or differs from what was written.
            InputError: it is a checkpoint of another model.
        """
        folder = self.folder / step_name(step)
        manifest = read_manifest(folder)
        self._check_config(manifest, folder)
        verify_files(folder, manifest)
        stored = stored_tensors(folder)
        state.check_model(model, stored, folder)
        state.check_optimizer(model, optimizer, stored, folder)
        moments = state.empty_optimizer_tensors(stored)
        tensors = state.model_tensors(model) | moments
        read_tensors(folder, tensors)
        if digests(tensors, manifest.tensors) != manifest.tensors:
            raise DamagedCheckpointError(f"{folder}: the tensors read differ from those written")
        state.restore_optimizer(model, optimizer, moments)
        set_rng_state(json.loads((folder / _RNG).read_bytes()))
        return manifest.progress

    def load_latest(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]] | None:
        """Restore the newest checkpoint that is not damaged; a warning names each damaged one that it skips.

        Returns:
            Step and progress; None when there is no checkpoint.

        Raises:
            SlotMambaError: there are checkpoints, but each of them is damaged.
            InputError: the newest is a checkpoint of another model.
        """
        return load_newest(self.folder, lambda step: self.load(step, model, optimizer))

    def _write(
        self,
        folder: Path,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: dict[str, Any],
    ) -> None:
        """A whole checkpoint in ``folder``, manifest last, everything synced."""
        if folder.exists():
            shutil.rmtree(folder)
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            sync_folder(self.folder.parent)
        folder.mkdir()
        tensors = state.model_tensors(model) | state.optimizer_tensors(model, optimizer)
        write_tensors(folder, tensors)
        write_json(folder / _RNG, rng_state())
        written = digests(tensors, sample(tensors))
        if read_digests(folder, written) != written:
            raise SlotMambaError(f"{folder}: the tensors read back differ from those in memory")
        manifest = Manifest(
            format=FORMAT,
            step=step,
            updates=state.update_count(optimizer),
            finite=all_finite(tensors.values()),
            model=self.model_config,
            progress=progress,
            aliases=state.aliases(model),
            files=record_files(folder),
            tensors=written,
            torch=torch.__version__,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._check_progress(manifest)
        write_manifest(folder, manifest)

    def _check_progress(self, manifest: Manifest) -> None:
        """Where the optimizer made updates since the last checkpoint, the tensors must have changed (NaN does not)."""
        before = [step for step in self.committed() if step < manifest.step]
        if not before:
            return
        previous = read_manifest(self.folder / step_name(before[-1]))
        updated = manifest.updates != previous.updates
        if updated and manifest.finite and manifest.tensors == previous.tensors:
            raise SlotMambaError(
                f"the weights at step {manifest.step} are those of the checkpoint of step {previous.step}, "
                f"though the optimizer has made {manifest.updates - previous.updates} updates"
            )

    def _commit(self, temporary: Path, step: int) -> Path:
        """Give a complete temporary folder its name. A crash from here on loses nothing: `clean` would do the same."""
        final = self.folder / step_name(step)
        replaced = self._set_aside(final) if final.exists() else None
        temporary.rename(final)
        sync_folder(self.folder)
        if replaced:
            _delete(replaced)
        return final

    def _set_aside(self, checkpoint: Path) -> Path:
        """From here on the folder is not a checkpoint."""
        aside = checkpoint.with_name(f".old-{checkpoint.name}-{os.getpid()}")
        checkpoint.rename(aside)
        sync_folder(self.folder)
        return aside

    def _prune(self, saved: int) -> None:
        # Later steps than the one just saved are there when they were damaged and the run began again before them.
        steps = [step for step in self.committed() if step <= saved]
        manifests = [read_manifest(self.folder / step_name(step)) for step in steps]
        healthy = [manifest.step for manifest in manifests if manifest.finite]
        for manifest in manifests[: -self.keep]:
            if manifest.step != max(healthy, default=None):
                _delete(self._set_aside(self.folder / step_name(manifest.step)))

    def _check_config(self, manifest: Manifest, folder: Path) -> None:
        differences = _differences(manifest.model, self.model_config, "model")
        if differences:
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise InputError(f"{folder} is of another model: {', '.join(differences[:3])}{more}")

    def _save_error(self, step: int, error: OSError) -> OSError:
        latest = self.latest()
        good = (
            "there is no earlier one" if latest is None else f"the last good one is {self.folder / step_name(latest)}"
        )
        return OSError(
            error.errno, f"cannot write checkpoint {self.folder / step_name(step)}: {error.strerror or error}; {good}"
        )


def _differences(there: Any, here: Any, key: str) -> list[str]:
    """Keys in which two JSON values differ, with both values."""
    if isinstance(there, dict) and isinstance(here, dict):
        names = [*there, *(name for name in here if name not in there)]
        nested = (_differences(there.get(name), here.get(name), f"{key}.{name}") for name in names)
        return [difference for differences in nested for difference in differences]
    return [] if there == here else [f"{key} is {json.dumps(there)} there and {json.dumps(here)} here"]


def _delete(checkpoint: Path) -> None:
    """Delete a folder that was set aside. That it fails is not worth ending a run for: `clean` tries again."""
    try:
        (checkpoint / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)
    except OSError as error:
        logger.warning("cannot delete the old checkpoint %s: %s", checkpoint, error.strerror)
