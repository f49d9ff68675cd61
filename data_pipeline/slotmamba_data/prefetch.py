"""Read a plan ahead in worker processes: the same rows in the same order as without."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator

from slotmamba_data.packing import Row
from slotmamba_data.plan import Plan, PlanReader
from slotmamba_data.worker import Handler, Worker

_AHEAD = 2  # batches that are read before they are asked for


class PrefetchReader(PlanReader):
    """A reader whose next batches are read by worker processes while the caller works.

    Each batch is divided among all workers. What is ahead is bounded, and no part of the position or the state: those
    are of what the caller was given. Where the next batch has another size or part than the one before, what was read
    ahead is dropped.

    Args:
        plan: the plan; each worker opens it for itself.
        start: position of the reader.
        workers: how many; they start with the first batch.
    """

    def __init__(self, plan: Plan, start: int = 0, workers: int = 1) -> None:
        super().__init__(plan, start)
        assert workers >= 1
        self._count = workers
        self._workers: list[Worker] = []
        self._shape: tuple[int, int, int] | None = None
        self._ahead: deque[list[Worker]] = deque()  # of each batch the workers that read it, in the order of its rows

    def next_batch(self, rows: int, part: int = 0, parts: int = 1) -> list[Row]:
        """As for `PlanReader`; an error of a worker is raised when the row is due that it could not read.

        Raises:
            ChildProcessError: a worker died.
        """
        assert rows % parts == 0 and 0 <= part < parts
        try:
            batch = self._next(rows, part, parts)
        except ChildProcessError:
            self._end()
            raise
        self.samples_consumed += rows
        return batch

    def _next(self, rows: int, part: int, parts: int) -> list[Row]:
        if not self._workers:
            handler = functools.partial(_handler, self.plan)
            self._workers = [Worker(f"data worker {number}", handler) for number in range(self._count)]
        if self._shape != (rows, part, parts):
            self._drop()
            self._shape = rows, part, parts
        while len(self._ahead) <= _AHEAD:
            self._request(self.samples_consumed + len(self._ahead) * rows + part * (rows // parts), rows // parts)
        return self._receive()

    def _request(self, start: int, rows: int) -> None:
        """Have `rows` rows from `start` on read, by as many workers as there are rows for."""
        size = -(-rows // self._count)
        readers = []
        for worker, first in zip(self._workers, range(start, start + rows, size), strict=False):
            worker.send((first, min(first + size, start + rows)))
            readers.append(worker)
        self._ahead.append(readers)

    def _receive(self) -> list[Row]:
        batch: list[Row] = []
        readers = self._ahead[0]
        try:
            while readers:
                batch += readers.pop(0).receive()
        except ChildProcessError:
            raise
        except Exception:
            self._drop()  # so that the same batch may be asked for again
            raise
        self._ahead.popleft()
        return batch

    def _drop(self) -> None:
        """Let the workers finish what they are at, and forget it."""
        for readers in self._ahead:
            for worker in readers:
                try:
                    worker.receive()
                except ChildProcessError:
                    raise
                except Exception:  # of rows that nobody was given: it comes again when they are due
                    continue
        self._ahead.clear()

    def _end(self) -> None:
        while self._workers:
            self._workers.pop().close()
        self._ahead.clear()

    def close(self) -> None:
        """End the workers and close the plan; reading starts them again."""
        self._end()
        super().close()


def _handler(plan: Plan) -> Handler:
    def read(numbers: tuple[int, int]) -> Iterator[list[Row]]:
        yield [plan[number] for number in range(*numbers)]

    return read
