"""What a run shows while it trains: a progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

logger = logging.getLogger(__name__)

_FORMATS = {
    "loss": "loss {:.4f}",
    "bits_per_token": "{:.4f} bits/token",
    "lr": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
}


class Progress:
    """Shows how far a run is, on standard output.

    ::

        with Progress(total_steps, step) as progress:
            progress.message("resumes after step 100")
            progress.update(110, {"kind": "train", "loss": 3.2, "lr": 1e-3, "tokens_per_second": 1e5})
    """

    def __init__(self, total: int, start: int, console: Console | None = None) -> None:
        """
        Args:
            total: Steps of the whole run.
            start: Steps that were done before.
            console: Where to write; standard output by default.
        """
        self._total = total
        self._start = start
        self._clock = time.monotonic()
        self._console = console or Console()
        self._bar = RichProgress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=start)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: int, record: Mapping[str, Any]) -> None:
        """Show a record of metrics.jsonl, logged after ``step`` steps.

        On a terminal a train record moves the bar; a record of a validation source stays as a line above it.
        """
        if "source" in record:
            self.message(f"step {step}/{self._total}  validation {record['source']}  {_values(record)}")
        elif self._console.is_terminal:
            self._bar.update(self._task, completed=step, description=_values(record))
        else:
            self.message(f"step {step}/{self._total}  {_values(record)}  {self._time_left(step)} left")

    def message(self, text: str) -> None:
        """Show a line that stays, and log it. Once nobody reads the output any more nothing is shown: that does not
        end a run."""
        if not self._console.quiet:
            logger.info("%s", text)
        try:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
            self._console.file.flush()
        except (BrokenPipeError, SystemExit):  # rich turns the first into the second
            self._console = Console(file=io.StringIO())

    def _time_left(self, step: int) -> timedelta:
        seconds_per_step = (time.monotonic() - self._clock) / max(1, step - self._start)
        return timedelta(seconds=round(seconds_per_step * (self._total - step)))


def _values(record: Mapping[str, Any]) -> str:
    known = [text.format(record[key]) for key, text in _FORMATS.items() if key in record]
    recall = [f"{key} {value:.3f}" for key, value in record.items() if key.startswith("recall/")]
    return "  ".join(known + recall)
