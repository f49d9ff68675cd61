"""ZeRO's part of a checkpoint: the files that DeepSpeed saves, one for each process and more, in the folder ``zero``.

The same number of processes reads them as they are. For another number they are converted to DeepSpeed's universal
format first, in ``.universal-step-00000100`` beside the checkpoint, for as long as reading takes: no manifest would
vouch for a copy that is kept. All of them are pickles: reading them runs what they say, so open only checkpoints that
you trust.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slotmamba.checkpoint import state
from slotmamba.checkpoint.contents import Contents, Snapshot, Written, compare_digests
from slotmamba.checkpoint.folder import universal_folder
from slotmamba.checkpoint.group import Group
from slotmamba.checkpoint.manifest import DamagedCheckpointError, Manifest
from slotmamba.checkpoint.tensors import all_finite, digests, os_error, read_tensors, sample, stored_tensors
from slotmamba_data.files import sync_folder

if TYPE_CHECKING:
    from slotmamba.engines.deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

TAG = "zero"


class ZeroSnapshot(Snapshot):
    """The engine's values of now."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self.aliases = state.aliases(engine.model)
        self.updates = _updates(engine)

    def write(self, folder: Path, group: Group) -> Written:
        # DeepSpeed's own barriers are between its writes: a process that raised would leave the others waiting.
        files = _Files()
        with files.instead_of_deepspeeds(self._engine.zero):
            self._engine.zero.save_checkpoint(folder, TAG, _client_state(), save_latest=False)
        group.together(files.raise_failure)
        group.on_main(lambda: sync_folder(folder / TAG))
        finite = group.together(lambda: all_finite(_local_tensors(self._engine)))
        return Written(_digests(self._engine, sample(_shapes(self._engine)), group), all(finite))

    def staged(self, buffers: dict[str, Tensor]) -> Snapshot:
        raise AssertionError("the recipe's schema refuses train.checkpoint.async for deepspeed")


class ZeroContents(Contents):
    engine = "deepspeed"

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self.zero_stage = engine.recipe.parallel.zero_stage

    def snapshot(self) -> ZeroSnapshot:
        return ZeroSnapshot(self._engine)

    def read(self, folder: Path, manifest: Manifest, group: Group) -> None:
        if manifest.engine != "deepspeed":
            self._read_weights(folder, group)
        elif manifest.world_size == group.size:
            with _repaired(self._engine):
                group.together(lambda: self._engine.zero.load_checkpoint(folder, TAG))
        else:
            universal = group.on_main(lambda: _convert(folder, manifest, group.size))
            with _repaired(self._engine), _reading_universal(self._engine.zero):
                group.together(lambda: self._engine.zero.load_checkpoint(universal, TAG))
            group.on_main(lambda: shutil.rmtree(universal))
        if _updates(self._engine) != manifest.updates:
            raise DamagedCheckpointError(f"{folder}: DeepSpeed restored {_updates(self._engine)} updates, not all")
        compare_digests(folder, _digests(self._engine, manifest.tensors, group), manifest.tensors)

    def _read_weights(self, folder: Path, group: Group) -> None:
        """The weights of a checkpoint from before the first update that another engine wrote, tensor by tensor."""
        import deepspeed

        stored = group.together(lambda: stored_tensors(folder))[group.rank]
        shapes = {name: shape for name, shape in _shapes(self._engine).items() if name.startswith("model.")}
        state.check_model(shapes, stored, folder)
        with torch.no_grad():
            for name, parameter in self._engine.model.named_parameters():
                value = torch.empty_like(stored[f"model.{name}"], device="cpu")
                read_tensors(folder, {f"model.{name}": value}, group)
                with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0, enabled=self.zero_stage == 3):
                    parameter.copy_(value)
        self._engine.optimizer.refresh_fp32_params()


class _Files:
    """Writes what DeepSpeed hands over, durably, and keeps the first error until all processes can hear of it."""

    def __init__(self) -> None:
        self._failure: BaseException | None = None

    @contextlib.contextmanager
    def instead_of_deepspeeds(self, zero: Any) -> Iterator[None]:
        engine = zero.checkpoint_engine
        originals = {name: getattr(engine, name) for name in ("save", "makedirs")}
        engine.save, engine.makedirs = self._save, self._make
        zero._copy_recovery_script = lambda folder: None  # copies of DeepSpeed's scripts, which are at hand
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(engine, name, original)
            del zero._copy_recovery_script

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise os_error(self._failure) or self._failure

    def _save(self, state_dict: dict[str, Any], path: str) -> None:
        if self._failure is not None:
            return
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())
        except Exception as error:
            self._failure = error

    def _make(self, path: str, exist_ok: bool) -> None:
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self._failure = self._failure or error


def _client_state() -> dict[str, Any]:
    """What the conversion to the universal format asks for in checkpoints of stages 1 and 2."""
    from deepspeed.checkpoint.constants import (
        UNIVERSAL_CHECKPOINT_INFO,
        UNIVERSAL_CHECKPOINT_VERSION_KEY,
        UNIVERSAL_CHECKPOINT_VERSION_VALUE,
    )

    return {UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}}


def _convert(checkpoint: Path, manifest: Manifest, size: int) -> Path:
    """The checkpoint in the universal format, in a folder that is to be deleted when it is read."""
    from deepspeed.checkpoint import ds_to_universal

    target = universal_folder(checkpoint)
    logger.warning(
        "%s was saved by a world of %d, this is one of %d: converting it in %s",
        checkpoint,
        manifest.world_size,
        size,
        target,
    )
    shutil.rmtree(target, ignore_errors=True)
    try:
        with _without_bars(ds_to_universal):
            ds_to_universal.main(
                argparse.Namespace(
                    input_folder=str(checkpoint / TAG),
                    output_folder=str(target / TAG),
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=False,
                )
            )
    except (OSError, RuntimeError) as error:  # torch reports a full disk by a RuntimeError
        shutil.rmtree(target, ignore_errors=True)
        raise OSError(f"cannot convert {checkpoint} for another number of processes in {target}: {error}") from error
    return target


@contextlib.contextmanager
def _without_bars(converter: Any) -> Iterator[None]:
    """Progress bars and what the converter prints would stand in the run's own output. Errors it raises."""
    bars = converter.tqdm
    converter.tqdm = SimpleNamespace(tqdm=iter)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        converter.tqdm = bars


@contextlib.contextmanager
def _reading_universal(zero: Any) -> Iterator[None]:
    deepspeed = logging.getLogger("DeepSpeed")
    zero._config.load_universal_checkpoint = True
    deepspeed.addFilter(_is_news)
    try:
        yield
    finally:
        deepspeed.removeFilter(_is_news)
        zero._config.load_universal_checkpoint = False


def _is_news(record: logging.LogRecord) -> bool:
    """Not that there is no tensor parallelism, which every process would say."""
    return not record.getMessage().startswith("MPU is not provided")


@contextlib.contextmanager
def _repaired(engine: DeepSpeedEngine) -> Iterator[None]:
    """Puts right what DeepSpeed restores wrongly. The hyper-parameters stay the recipe's: from a universal checkpoint,
    stage 3 gives those of the first group, weight decay and all, to every group. And it gives all groups one step
    counter, which each of them would then increase."""
    groups = engine.optimizer.optimizer.param_groups
    kept = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    yield
    for group, values in zip(engine.optimizer.optimizer.param_groups, kept, strict=True):
        group.update(values)
    for each in _states(engine):
        if "step" in each:
            each["step"] = torch.as_tensor(each["step"], dtype=torch.float32).clone()


def _states(engine: DeepSpeedEngine) -> list[dict[str, Tensor]]:
    """This process's optimizer states, of whole groups of parameters."""
    return list(engine.optimizer.optimizer.state.values())


def _updates(engine: DeepSpeedEngine) -> int:
    return max((int(each["step"]) for each in _states(engine) if "step" in each), default=0)


def _local_tensors(engine: DeepSpeedEngine) -> list[Tensor]:
    weights = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.model.parameters()]
    return [*weights, *(value for each in _states(engine) for value in each.values())]


def _shapes(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """All tensors by name, on the meta device."""
    from slotmamba.engines.deepspeed import MOMENTS

    shapes = {}
    for name, parameter in engine.model.named_parameters():
        whole = torch.empty(getattr(parameter, "ds_shape", parameter.shape), dtype=parameter.dtype, device="meta")
        shapes[f"model.{name}"] = whole
        if _updates(engine) > 0:
            shapes |= {f"optimizer.{name}.{key}": whole for key in MOMENTS}
    return shapes


def _digests(engine: DeepSpeedEngine, names: Iterable[str], group: Group) -> dict[str, str]:
    """Digests of whole tensors, gathered one at a time."""
    found: dict[str, str] = {}
    for name in names:
        found |= digests(engine.tensors([name]), [name], group)
    return found
