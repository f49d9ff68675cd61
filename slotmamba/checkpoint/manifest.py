"""The manifest of a checkpoint: written last, it says that the checkpoint is complete and what it must contain."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from slotmamba.errors import SlotMambaError
from slotmamba.files import write_json

MANIFEST = "manifest.json"
FORMAT = 2


class DamagedCheckpointError(SlotMambaError):
    """A checkpoint does not hold what was written; the text names the file and the reason in one line."""


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return cls(path.stat().st_size, digest)


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json. All values are JSON; the file also holds a digest of itself."""

    format: int
    step: int
    updates: int
    """Updates that the optimizer has made: less than ``step`` where steps were skipped."""
    finite: bool
    """Every weight and optimizer moment is finite."""
    engine: str
    """The recipe's parallel.engine. Those of single and fsdp2 can be read by either, on any number of processes."""
    zero_stage: int | None
    """The recipe's parallel.zero_stage for deepspeed."""
    world_size: int
    """Processes that wrote it."""
    model: dict[str, Any]
    """The recipe's model section."""
    progress: dict[str, Any]
    """The caller's own state: position in the data and so on."""
    aliases: dict[str, str]
    """Tied weights: the name that is not stored -> the name that is."""
    files: dict[str, FileRecord]
    """Every other file of the folder, by its path in there."""
    tensors: dict[str, str]
    """sha256 digests of a sample of the tensors."""
    torch: str
    """Version of torch that wrote the checkpoint."""
    time: str
    """When it was written: ISO 8601, UTC."""


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def committed_steps(folder: Path) -> list[int]:
    """Steps in ascending order of the checkpoints in ``folder`` whose manifest is there and intact."""
    return [step for step in claimed_steps(folder) if is_intact(folder / step_name(step))]


def claimed_steps(folder: Path) -> list[int]:
    """Steps in ascending order of the step folders in ``folder``, intact or not.

    A folder gets this name when it is complete, and loses it before anything in it is deleted: one without a manifest
    is damaged.
    """
    matches = [re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.glob("step-*") if path.is_dir()]
    return sorted(int(match[1]) for match in matches if match)


def is_intact(checkpoint: Path) -> bool:
    """Whether the folder has a manifest that can be read: all else was written before it."""
    try:
        read_manifest(checkpoint)
    except DamagedCheckpointError:
        return False
    return True


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Write manifest.json into the folder ``checkpoint``, atomically.

    Raises:
        OSError: it could not be written.
        ValueError, TypeError: ``progress`` or ``model`` is not JSON.
    """
    body = asdict(manifest)
    write_json(checkpoint / MANIFEST, body | {"sha256": _digest(body)})


def read_manifest(checkpoint: Path) -> Manifest:
    """Read manifest.json of the folder ``checkpoint``.

    Raises:
        DamagedCheckpointError: it is missing, damaged, or of a format that this version does not know.
    """
    path = checkpoint / MANIFEST
    try:
        body = json.loads(path.read_bytes())
        digest = body.pop("sha256")
        intact = digest == _digest(body)
    except OSError as error:
        raise DamagedCheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} is not a manifest, or damaged") from error
    if not intact:
        raise DamagedCheckpointError(f"{path} is damaged: its digest differs")
    if body["format"] != FORMAT:
        raise DamagedCheckpointError(f"{path} has format {body['format']}, this version reads format {FORMAT}")
    if checkpoint.name.startswith("step-") and checkpoint.name != step_name(body["step"]):
        raise DamagedCheckpointError(f"{path} is of step {body['step']}: the folder was renamed")
    files = {name: FileRecord(**record) for name, record in body.pop("files").items()}
    return Manifest(**body, files=files)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


def list_files(checkpoint: Path) -> list[str]:
    """Paths of all files in the folder and below it, relative to it."""
    return sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())


def verify_files(checkpoint: Path, manifest: Manifest, rank: int = 0, size: int = 1) -> None:
    """Compare each file's size, then sha256, with the manifest: all, or every ``size``-th from number ``rank`` on.

    So ``size`` processes verify them together.

    Raises:
        DamagedCheckpointError: a file is missing, cannot be read or differs; the text names it.
    """
    for name in sorted(manifest.files)[rank::size]:
        path, expected = checkpoint / name, manifest.files[name]
        try:
            bytes_found = path.stat().st_size
            if bytes_found != expected.bytes:
                raise DamagedCheckpointError(f"{path} has {bytes_found} bytes, {expected.bytes} were written")
            if FileRecord.of(path) != expected:
                raise DamagedCheckpointError(f"{path} is damaged: its sha256 differs from the manifest's")
        except OSError as error:
            raise DamagedCheckpointError(f"{path}: {error.strerror}") from error
