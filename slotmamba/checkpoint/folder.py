"""The folder of a run's checkpoints: temporary ones, their commit, those that are thrown away.

A checkpoint is ``RUN_DIR/checkpoints/step-00000100``. It is written to ``.tmp-step-00000100-PID``, every file synced,
the manifest last, and renamed. A folder without an intact manifest is not a checkpoint. What is thrown away is first
renamed to ``.old-step-00000100-PID``, and of its files the manifest goes first.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from slotmamba.checkpoint.manifest import MANIFEST, committed_steps, is_intact, read_manifest, step_name
from slotmamba_data.files import sync_folder

logger = logging.getLogger(__name__)


class CheckpointFolder:
    """Used by one process of a run, the main one."""

    def __init__(self, path: Path, keep: int) -> None:
        assert keep >= 1
        self.path = path
        self.keep = keep

    def committed(self) -> list[int]:
        """Steps of the complete checkpoints in ascending order."""
        return committed_steps(self.path)

    def checkpoint(self, step: int) -> Path:
        return self.path / step_name(step)

    def clean(self) -> None:
        """Tidy up after processes that died, at the start of a run.

        Nobody else writes here, so every temporary folder was left behind, even if its number is that of another
        process by now. One with an intact manifest is complete and only lacks its name: it gets it. All others go.
        """
        for path in sorted(self.path.glob(".*")):
            match = re.fullmatch(r"\.(tmp|old)-step-(\d+)-\d+", path.name)
            if match is None:
                continue
            step = int(match[2])
            if match[1] == "tmp" and is_intact(path) and step not in self.committed():
                self.commit(path, step)
            else:
                shutil.rmtree(path)
        for path in self.path.glob(".universal-*"):  # left by a process that was killed while it read one
            shutil.rmtree(path)

    def make_temporary(self, step: int) -> Path:
        """An empty folder for the checkpoint of ``step``."""
        temporary = self.path / f".tmp-{step_name(step)}-{os.getpid()}"
        if temporary.exists():
            shutil.rmtree(temporary)
        if not self.path.exists():
            self.path.mkdir(parents=True)
            sync_folder(self.path.parent)
        temporary.mkdir()
        return temporary

    def commit(self, temporary: Path, step: int) -> Path:
        """Give a complete temporary folder its name. A crash from here on loses nothing: `clean` would do the same."""
        final = self.checkpoint(step)
        replaced = self._set_aside(final) if final.exists() else None
        temporary.rename(final)
        sync_folder(self.path)
        if replaced:
            _delete(replaced)
        return final

    def prune(self, saved: int) -> None:
        """Throw away all but the ``keep`` newest up to step ``saved``; the newest with finite values stays."""
        # Later steps than the one just saved are there when they were damaged and the run began again before them.
        steps = [step for step in self.committed() if step <= saved]
        manifests = [read_manifest(self.checkpoint(step)) for step in steps]
        healthy = [manifest.step for manifest in manifests if manifest.finite]
        for manifest in manifests[: -self.keep]:
            if manifest.step != max(healthy, default=None):
                _delete(self._set_aside(self.checkpoint(manifest.step)))

    def save_error(self, step: int, error: OSError) -> OSError:
        """The error as one line with the path and the last good checkpoint."""
        steps = self.committed()
        good = f"the last good one is {self.checkpoint(steps[-1])}" if steps else "there is no earlier one"
        reason = error.strerror or error
        return OSError(error.errno, f"cannot write checkpoint {self.checkpoint(step)}: {reason}; {good}")

    def _set_aside(self, checkpoint: Path) -> Path:
        """From here on the folder is not a checkpoint."""
        aside = checkpoint.with_name(f".old-{checkpoint.name}-{os.getpid()}")
        checkpoint.rename(aside)
        sync_folder(self.path)
        return aside


def universal_folder(checkpoint: Path) -> Path:
    """Where a checkpoint of DeepSpeed's is in its universal format while another number of processes reads it."""
    return checkpoint.with_name(f".universal-{checkpoint.name}")


def _delete(checkpoint: Path) -> None:
    """Delete a folder that was set aside. That it fails is not worth ending a run for: `clean` tries again."""
    try:
        (checkpoint / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)
    except OSError as error:
        logger.warning("cannot delete the old checkpoint %s: %s", checkpoint, error.strerror)
