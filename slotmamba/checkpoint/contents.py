"""What a checkpoint holds of an engine: tensors by name, for any layout of processes to read, or ZeRO's own files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from slotmamba.checkpoint import state
from slotmamba.checkpoint.group import Group
from slotmamba.checkpoint.manifest import DamagedCheckpointError, Manifest
from slotmamba.checkpoint.tensors import (
    all_finite,
    digests,
    local,
    read_digests,
    read_tensors,
    sample,
    stored_tensors,
    write_tensors,
)
from slotmamba.errors import SlotMambaError


@dataclass(frozen=True)
class Written:
    """What the manifest says of the tensors that were written."""

    tensors: dict[str, str]
    finite: bool


class Snapshot(ABC):
    """Model and optimizer at one step, ready to be written."""

    aliases: dict[str, str]
    updates: int

    @abstractmethod
    def write(self, folder: Path, group: Group) -> Written:
        """Write all tensors into the folder, which is there, and fsync the files. Collective.

        Raises:
            OSError: a process could not write its part; in all processes.
            SlotMambaError: what is on disk is not what was in memory.
        """

    @abstractmethod
    def staged(self, buffers: dict[str, Tensor]) -> Snapshot:
        """A copy on the CPU, which the run's next steps do not change.

        Args:
            buffers: where it is kept; what is there from a copy before, and fits, is written over.
        """


class Contents(ABC):
    """Model and optimizer of a run, as its engine holds them."""

    engine: Literal["single", "fsdp2", "deepspeed"]
    zero_stage: int | None

    @abstractmethod
    def snapshot(self) -> Snapshot:
        """The values of now; they change with the run's."""

    @abstractmethod
    def read(self, folder: Path, manifest: Manifest, group: Group) -> None:
        """Restore model and optimizer from a checkpoint whose files are verified. Collective.

        Raises:
            DamagedCheckpointError: the tensors are not those that were written.
            InputError: they are of another model.
        """


@dataclass(frozen=True)
class TensorSnapshot(Snapshot):
    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    updates: int

    def write(self, folder: Path, group: Group) -> Written:
        write_tensors(folder, self.tensors, group)
        written = digests(self.tensors, sample(self.tensors), group)
        if group.on_main(lambda: read_digests(folder, written)) != written:
            raise SlotMambaError(f"{folder}: the tensors read back differ from those in memory")
        finite = group.together(lambda: all_finite(self.tensors.values()))
        return Written(written, all(finite))

    def staged(self, buffers: dict[str, Tensor]) -> TensorSnapshot:
        # On a GPU the buffers are in pinned memory, and all copies run at once.
        copies = {}
        for name, tensor in self.tensors.items():
            if name not in buffers or local(buffers[name]).shape != local(tensor).shape:
                on_gpu = local(tensor).is_cuda
                buffers[name] = torch.empty_like(tensor.detach(), device="cpu", pin_memory=on_gpu)
            copies[name] = buffers[name]
            local(copies[name]).copy_(local(tensor.detach()), non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return TensorSnapshot(copies, self.aliases, self.updates)


class TensorContents(Contents):
    """A model and an optimizer of torch: whole tensors, or FSDP2's DTensors."""

    zero_stage = None

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, engine: Literal["single", "fsdp2"] = "single"
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.engine = engine

    def snapshot(self) -> TensorSnapshot:
        tensors = state.model_tensors(self.model) | state.optimizer_tensors(self.model, self.optimizer)
        return TensorSnapshot(tensors, state.aliases(self.model), state.update_count(self.optimizer))

    def read(self, folder: Path, manifest: Manifest, group: Group) -> None:
        stored = group.together(lambda: stored_tensors(folder))[group.rank]
        tensors = state.model_tensors(self.model)
        state.check_model(tensors, stored, folder)
        state.check_optimizer(self.model, self.optimizer, stored, folder)
        moments = state.empty_optimizer_tensors(self.model, stored)
        read_tensors(folder, tensors | moments, group)
        check_digests(folder, tensors | moments, manifest.tensors, group)
        state.restore_optimizer(self.model, self.optimizer, moments)


def check_digests(folder: Path, tensors: Mapping[str, Tensor], written: Mapping[str, str], group: Group) -> None:
    """Compare the digests of tensors that were read with those of the manifest. Collective.

    Raises:
        DamagedCheckpointError: one differs.
    """
    compare_digests(folder, digests(tensors, written, group), written)


def compare_digests(folder: Path, found: Mapping[str, str], written: Mapping[str, str]) -> None:
    """Compare digests with those of the manifest; errors as for `check_digests`."""
    wrong = [name for name in written if found[name] != written[name]]
    if wrong:
        raise DamagedCheckpointError(f"{folder}: the values read of {wrong[0]} differ from those written")
