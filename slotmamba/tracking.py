"""Weights & Biases as an optional sink; metrics.jsonl is the record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slotmamba.config.schema import Recipe
from slotmamba.errors import one_line

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)


class Tracker:
    """Sends records to the Weights & Biases run that ``logging.wandb`` asks for.

    Whatever goes wrong there (not installed, no account, no network, an error in a call) ends in one warning, and the
    sink is off for the rest of the process: training goes on.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, state: Mapping[str, Any] | None) -> None:
        """
        Args:
            run_dir: Folder of the run; wandb's files go to ``wandb`` in it.
            state: What `state` returned in the process that this one resumes; the same wandb run goes on then.
        """
        self._id: str | None = state["id"] if state else None
        self._run: wandb.Run | None = None
        if recipe.logging.wandb.mode != "disabled":
            self._guarded(lambda: self._start(recipe, run_dir))

    def log(self, record: Mapping[str, Any]) -> None:
        """Send a record of metrics.jsonl: numbers become ``train/KEY`` or ``validation/SOURCE/KEY``, over ``step``."""
        run = self._run
        if run is not None:
            self._guarded(lambda: run.log(_named(record)))

    def state(self) -> dict[str, Any]:
        """JSON to save in checkpoints: the wandb run's id, None if there never was one."""
        return {"id": self._id}

    def close(self) -> None:
        """Finish the wandb run: what is still on its way is sent or written."""
        run = self._run
        if run is not None:
            self._guarded(run.finish)
            self._run = None

    def _start(self, recipe: Recipe, run_dir: Path) -> None:
        import wandb

        run = wandb.init(
            project=recipe.logging.wandb.project,
            name=recipe.name,
            # With an id, "allow" goes on with that run, or makes it; without one it would do nothing.
            id=self._id,
            resume="allow",
            mode=recipe.logging.wandb.mode,
            dir=run_dir,
            config=recipe.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # NOTE: wandb's own step only counts up, and drops what a resumed run repeats: all curves are over our step.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._id = run.id
        self._run = run

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            self._run = None
            logger.warning("wandb is off from here on, training goes on: %s: %s", type(error).__name__, one_line(error))


def _named(record: Mapping[str, Any]) -> dict[str, float]:
    prefix = f"{record['kind']}/{record['source']}" if "source" in record else record["kind"]
    values = {f"{prefix}/{key}": value for key, value in record.items() if key != "step" and _is_number(value)}
    return {"step": record["step"], **values}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
