"""Checkpoints that several processes write and read together."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from slotmamba.checkpoint.manifest import step_name
from tests.distributed.checkpoint_ranks import WholeRun
from tests.distributed.checkpoint_server import CheckpointRanks
from tests.train.runs import assert_same_tensors, committed, tensors

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CheckpointRanks]:
    ranks = CheckpointRanks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def saved_by_4(ranks: CheckpointRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("four") / "run"
    ranks.succeed(4, "train", run_dir, 2, False)
    return run_dir


def manifest(run_dir: Path, step: int) -> dict:
    return json.loads((run_dir / "checkpoints" / step_name(step) / "manifest.json").read_text())


def test_what_four_ranks_write(saved_by_4: Path, tmp_path: Path) -> None:
    """The same tensors and digests as one process, in a part for each rank."""
    run = WholeRun(tmp_path)
    for _ in range(2):
        run.advance().save()
    assert_same_tensors(tensors(saved_by_4, 2), tensors(tmp_path, 2))
    four, one = manifest(saved_by_4, 2), manifest(tmp_path, 2)
    assert (four["engine"], four["world_size"], one["engine"], one["world_size"]) == ("fsdp2", 4, "single", 1)
    same = ("step", "updates", "finite", "model", "progress", "aliases", "tensors")
    assert {key: four[key] for key in same} == {key: one[key] for key in same}
    assert sorted(four["files"]) == [".metadata", *(f"__{rank}_0.distcp" for rank in range(4))]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_number_of_ranks_restores_the_same(
    ranks: CheckpointRanks, saved_by_4: Path, tmp_path: Path, size: int
) -> None:
    ranks.succeed(size, "copy", saved_by_4, tmp_path)
    assert_same_tensors(tensors(tmp_path, 2), tensors(saved_by_4, 2))
    assert manifest(tmp_path, 2)["tensors"] == manifest(saved_by_4, 2)["tensors"]
    assert manifest(tmp_path, 2)["updates"] == 2


def test_one_process_and_two_ranks_take_turns(ranks: CheckpointRanks, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ranks.succeed(2, "train", run_dir, 1, False)
    single = WholeRun(run_dir, seed=5)
    assert single.resume()
    single.advance().save()
    ranks.succeed(2, "train", run_dir, 1, True)
    single = WholeRun(run_dir, seed=6)
    assert single.resume()
    assert single.step == 3
    assert single.snapshot() == WholeRun(tmp_path / "uninterrupted").advance(3).snapshot()


def test_saved_in_the_background_while_training_goes_on(
    ranks: CheckpointRanks, saved_by_4: Path, tmp_path: Path
) -> None:
    ranks.succeed(4, "train", tmp_path, 2, True)
    assert committed(tmp_path) == [1, 2]
    for step in (1, 2):
        assert_same_tensors(tensors(tmp_path, step), tensors(saved_by_4, step))


@pytest.mark.parametrize("background", [False, True], ids=["in place", "in the background"])
def test_one_rank_has_no_room(ranks: CheckpointRanks, tmp_path: Path, background: bool) -> None:
    """The same line on both ranks, the checkpoint before stays, and nobody waits for the one that failed."""
    ranks.succeed(2, "train", tmp_path, 1, False)
    folder = tmp_path / "checkpoints"
    for rank, limit in ((0, 0), (0, 2500), (1, 0), (1, 2500)):
        outputs = ranks.succeed(2, "save_with_limit", tmp_path, rank, limit, background)
        expected = (
            f"cannot write checkpoint {folder}/step-00000002: File too large (rank {rank}); "
            f"the last good one is {folder}/step-00000001\n"
        )
        assert all(output.endswith(expected) for output in outputs), outputs
        assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    ranks.succeed(2, "train", tmp_path, 1, False)
    assert committed(tmp_path) == [1, 2]


def test_other_values_than_those_written(ranks: CheckpointRanks, saved_by_4: Path, tmp_path: Path) -> None:
    ranks.succeed(2, "train", tmp_path, 2, False)
    outputs = ranks.succeed(2, "damage_while_reading", tmp_path)
    assert all("resumed 1\n" in output for output in outputs)
    assert "step 2 is skipped" in outputs[0] and "the values read of model.embedding.weight differ" in outputs[0]
    assert "skipped" not in outputs[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "background", "stride"),
    [
        (0, False, 4),
        (0, True, 7),
        (1, False, 1),
        (1, True, 1),
        pytest.param(0, False, 1, marks=pytest.mark.soak),
        pytest.param(0, True, 1, marks=pytest.mark.soak),
    ],
)
def test_one_rank_is_killed_before_its_file_operations(
    ranks: CheckpointRanks, tmp_path: Path, rank: int, background: bool, stride: int
) -> None:
    """The other one ends too, with an error; the same command goes on from the checkpoint before, or the new one."""
    prepared = tmp_path / "prepared"
    ranks.succeed(2, "train", prepared, 2, False)
    expected = {step: WholeRun(tmp_path / str(step)).advance(step).snapshot() for step in (2, 3)}
    resumed = set()
    for operation in itertools.count(1, stride):
        run_dir = tmp_path / f"operation {operation}"
        shutil.copytree(prepared, run_dir)
        codes, outputs = ranks.run(2, "save_and_die", run_dir, rank, operation, background)
        survivor = WholeRun(run_dir, seed=9)
        survivor.store.clean()
        assert not list(survivor.store.folder.path.glob(".*"))
        assert survivor.resume()
        assert survivor.snapshot() == expected[survivor.step], operation
        if codes[rank] == 0:
            break
        assert codes[rank] == -9, outputs
        assert codes[1 - rank] == 1, "one that goes on alone"
        resumed.add(survivor.step)
        shutil.rmtree(run_dir)
    assert codes == [0, 0]
    assert survivor.step == 3
    assert 2 in resumed and operation > 3
