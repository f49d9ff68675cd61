"""Named tensors in a folder, through torch.distributed.checkpoint (DCP), and their digests.

DCP keeps the tensors in ``__0_0.distcp`` and, by torch's own design, an index of them as a pickle in ``.metadata``:
opening a checkpoint runs what that pickle says, so open only those you trust. All else in a checkpoint is JSON.
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

from slotmamba.checkpoint.manifest import DamagedCheckpointError

_SAMPLED_TENSORS = 16


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` into the folder, which is created, and fsync the files.

    Raises:
        OSError: they could not be written.
    """
    # The default planner does not cache its plan: a cached one has written old tensors again, and reported success.
    writer = FileSystemWriter(folder, sync_files=True)
    try:
        with _without_single_process_warning():
            save(dict(tensors), storage_writer=writer, planner=DefaultSavePlanner(), no_dist=True)
    except CheckpointException as error:
        raise _cause(error) from None


def read_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read the tensors with the names in ``tensors`` from the folder, in place.

    Raises:
        DamagedCheckpointError: they could not be read.
    """
    try:
        with _without_single_process_warning():
            load(dict(tensors), storage_reader=FileSystemReader(folder), no_dist=True)
    except CheckpointException as error:
        cause = _cause(error)
        if not isinstance(cause, Exception):  # Ctrl-C says nothing about the checkpoint
            raise cause from None
        reason = str(cause).splitlines()[0]
        raise DamagedCheckpointError(f"{folder}: torch {torch.__version__} cannot read the tensors: {reason}") from None


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in the folder by name, as meta tensors: shapes and dtypes without values."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {}
    for name, entry in entries.items():
        assert isinstance(entry, TensorStorageMetadata), f"{folder}: {name} is not a tensor"
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
    return tensors


def sample(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of up to 16 of the tensors, evenly spread over the sorted names.

    Scalars are left out: the optimizer's step counters change in any case, so a digest of them would hide that the rest
    did not.
    """
    names = sorted(name for name, tensor in tensors.items() if tensor.ndim > 0)
    if len(names) <= _SAMPLED_TENSORS:
        return names
    return [names[index * (len(names) - 1) // (_SAMPLED_TENSORS - 1)] for index in range(_SAMPLED_TENSORS)]


def digests(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, str]:
    """sha256 of dtype, shape and bytes of the named tensors."""
    return {name: _digest(tensors[name]) for name in names}


def read_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """`digests` of the named tensors as they are in the folder.

    Raises:
        DamagedCheckpointError: they could not be read.
    """
    stored = stored_tensors(folder)
    tensors = {name: torch.empty_like(stored[name], device="cpu") for name in names}
    read_tensors(folder, tensors)
    return digests(tensors, tensors)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """No NaN and no infinity in any of the tensors."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}\n".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def _without_single_process_warning() -> Iterator[None]:
    """DCP warns that it assumes a single process even where ``no_dist`` says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _cause(error: CheckpointException) -> BaseException:
    """What went wrong inside DCP, which wraps everything in a BaseException; an OSError where there is one."""
    cause, _ = next(iter(error.failures.values()))
    link: BaseException | None = cause
    while link is not None:
        if isinstance(link, OSError):
            return link
        link = link.__cause__ or link.__context__
    return cause
