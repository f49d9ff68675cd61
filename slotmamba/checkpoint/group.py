"""The processes that share a checkpoint: what fails in one of them fails in all, and none waits for one that failed."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from slotmamba.errors import SlotMambaError, one_line

T = TypeVar("T")


class Group:
    """All processes of a world, on a gloo group of their own.

    Its messages never mix with those of training, which go on while a thread saves. Every method is a collective: all
    processes call it, in the same order. When a process dies, the call ends in the others with torch's error.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        """Collective, too: all processes make the group together, after torch.distributed is initialised."""
        self.rank = rank
        self.size = size
        self.process_group = dist.new_group(backend="gloo") if size > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that makes, names and deletes the folders."""
        return self.rank == 0

    def together(self, action: Callable[[], T]) -> list[T]:
        """What `action` returns in each of the processes, in the order of ranks.

        Raises:
            BaseException: what `action` raised in the first of those where it failed, here in all of them; an OSError
                says which rank it was.
        """
        if self.process_group is None:
            return [action()]
        outcome: tuple[T | None, BaseException | None]
        try:
            outcome = action(), None
        except BaseException as error:
            outcome = None, _portable(error)
        outcomes: list[tuple[T | None, BaseException | None]] = [(None, None)] * self.size
        dist.all_gather_object(outcomes, outcome, group=self.process_group)
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                raise of_rank(failure, rank)
        return [cast(T, value) for value, _ in outcomes]

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns in the main process, the only one that calls it; errors as for `together`."""
        return cast(T, self.together(lambda: action() if self.is_main else None)[0])

    def gather(self, value: T) -> list[T] | None:
        """What each process passes, in the order of ranks; None in all but the main process."""
        if self.process_group is None:
            return [value]
        values: list[T | None] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.process_group)
        return cast("list[T] | None", values)


def of_rank(error: BaseException, rank: int) -> BaseException:
    """The error; where the system refused something, its text says in which process."""
    if isinstance(error, OSError) and error.strerror:
        error.strerror = f"{error.strerror} (rank {rank})"
    return error


def _portable(error: BaseException) -> BaseException:
    """The error, or its text where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return SlotMambaError(f"{type(error).__name__}: {one_line(error)}")
    return error
