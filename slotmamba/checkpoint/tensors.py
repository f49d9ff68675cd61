"""Named tensors in a folder, through torch.distributed.checkpoint (DCP), and their digests.

The tensors may be DTensors: each process writes its shards into ``__RANK_0.distcp``, and reads what its shards of any
other layout need. By torch's own design DCP keeps the index of them as a pickle in ``.metadata``: opening a checkpoint
runs what that pickle says, so open only those you trust. All else in such a checkpoint is JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from slotmamba.checkpoint.group import Group, of_rank
from slotmamba.checkpoint.manifest import DamagedCheckpointError

_SAMPLED_TENSORS = 16
_ALONE = Group()


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], group: Group = _ALONE) -> None:
    """Write ``tensors`` into the folder, which is created, and fsync the files. Collective.

    Raises:
        OSError: a process could not write its part, in all processes.
    """
    # The default planner does not cache its plan: a cached one has written old tensors again, and reported success.
    writer = FileSystemWriter(folder, sync_files=True)
    planner = DefaultSavePlanner()
    alone = group.process_group is None
    try:
        with _without_single_process_warning():
            save(
                dict(tensors),
                storage_writer=writer,
                planner=planner,
                process_group=group.process_group,
                no_dist=alone,
            )
    except CheckpointException as error:
        raise _cause(error, group) from None


def read_tensors(folder: Path, tensors: Mapping[str, Tensor], group: Group = _ALONE) -> None:
    """Read the tensors with the names in ``tensors`` from the folder, in place. Collective.

    Raises:
        DamagedCheckpointError: a process could not read its part, in all processes.
    """
    alone = group.process_group is None
    try:
        with _without_single_process_warning():
            load(
                dict(tensors),
                storage_reader=FileSystemReader(folder),
                process_group=group.process_group,
                no_dist=alone,
            )
    except CheckpointException as error:
        cause = _cause(error, group)
        if not isinstance(cause, Exception):  # Ctrl-C says nothing about the checkpoint
            raise cause from None
        reason = str(cause).splitlines()[0]
        raise DamagedCheckpointError(f"{folder}: torch {torch.__version__} cannot read the tensors: {reason}") from None


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in the folder by name, as meta tensors: whole shapes and dtypes without values."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {}
    for name, entry in entries.items():
        assert isinstance(entry, TensorStorageMetadata), f"{folder}: {name} is not a tensor"
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
    return tensors


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sample(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of up to 16 of the tensors, evenly spread over the sorted names.

    Scalars are left out: the optimizer's step counters change in any case, so a digest of them would hide that the rest
    did not.
    """
    names = sorted(name for name, tensor in tensors.items() if tensor.ndim > 0)
    if len(names) <= _SAMPLED_TENSORS:
        return names
    return [names[index * (len(names) - 1) // (_SAMPLED_TENSORS - 1)] for index in range(_SAMPLED_TENSORS)]


def digests(tensors: Mapping[str, Tensor], names: Iterable[str], group: Group = _ALONE) -> dict[str, str]:
    """sha256 of dtype, whole shape and whole value of the named tensors, however they are sharded. Collective.

    One tensor at a time is put together, in the main process.
    """
    return {name: _digest(tensors[name], group) for name in names}


def read_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """`digests` of the named tensors as they are in the folder, read one at a time by this process alone.

    Raises:
        DamagedCheckpointError: they could not be read.
    """
    stored = stored_tensors(folder)
    found = {}
    for name in names:
        tensor = torch.empty_like(stored[name], device="cpu")
        read_tensors(folder, {name: tensor})
        found |= digests({name: tensor}, [name])
    return found


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """No NaN and no infinity in any of the tensors, of DTensors in this process's shards."""
    return all(bool(torch.isfinite(local(tensor)).all()) for tensor in tensors)


def _digest(tensor: Tensor, group: Group) -> str:
    whole = _whole(tensor.detach(), group)

    def digest() -> str:
        assert whole is not None
        data = whole.cpu().contiguous()
        found = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}\n".encode())
        found.update(data.reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    return group.on_main(digest)


def _whole(tensor: Tensor, group: Group) -> Tensor | None:
    """The whole value of a DTensor on the CPU of the main process, None in the others; another tensor is whole."""
    if not isinstance(tensor, DTensor):
        return tensor
    # The place of the shard as DCP sees it: a list of at most one.
    places = [(chunk.offsets, chunk.sizes) for chunk in tensor.__create_chunk_list__()]
    shards = group.gather((places, tensor.to_local().cpu()))
    if shards is None:
        return None
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    for there, shard in shards:
        for offsets, sizes in there:
            whole[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))] = shard
    return whole


@contextlib.contextmanager
def _without_single_process_warning() -> Iterator[None]:
    """DCP warns that it assumes a single process even where ``no_dist`` says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _cause(error: CheckpointException, group: Group) -> BaseException:
    """What went wrong inside DCP, which wraps everything in a BaseException; an OSError where there is one."""
    rank, (cause, _) = next(iter(error.failures.items()))
    refused = os_error(cause)
    if refused is None:
        return cause
    return refused if group.process_group is None else of_rank(refused, rank)


def os_error(error: BaseException) -> OSError | None:
    """The OSError that `error` is or came from, None where there is none."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__cause__ or link.__context__
    return link
