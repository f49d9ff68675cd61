from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from slotmamba.checkpoint import CheckpointStore, DamagedCheckpointError
from slotmamba.errors import SlotMambaError
from tests.checkpoint.toy_run import CONFIG, ToyRun


def manifest_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "manifest.json").read_text())


def folders(run: ToyRun) -> list[str]:
    return sorted(path.name for path in run.store.folder.path.iterdir())


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, steps: int) -> None:
    run = ToyRun(tmp_path).advance(steps)
    before = run.snapshot()
    run.save()
    assert run.snapshot() == before, "saving changed the run"
    after = run.advance(3).snapshot()

    resumed = ToyRun(tmp_path, seed=99).advance(2)
    assert resumed.resume()
    assert resumed.step == steps
    assert resumed.snapshot() == before
    assert resumed.advance(3).snapshot() == after


def test_resume_twice(tmp_path: Path) -> None:
    expected = ToyRun(tmp_path / "a").advance(6).snapshot()
    ToyRun(tmp_path / "b").advance(2).save()
    for seed in (1, 2):
        run = ToyRun(tmp_path / "b", seed=seed)
        assert run.resume()
        run.advance(2).save()
    assert run.step == 6
    assert run.snapshot() == expected


def test_only_parameters_with_optimizer_state_get_one(tmp_path: Path) -> None:
    run = ToyRun(tmp_path).advance(1)
    assert run.model.unused.weight not in run.optimizer.state
    run.save()
    resumed = ToyRun(tmp_path)
    resumed.resume()
    assert resumed.model.unused.weight not in resumed.optimizer.state
    assert resumed.optimizer.state[resumed.model.temperature]["step"].item() == 1


def test_hyperparameters_are_those_of_the_recipe(tmp_path: Path) -> None:
    ToyRun(tmp_path).advance(1).save()
    resumed = ToyRun(tmp_path)
    resumed.optimizer.param_groups[0]["weight_decay"] = 0.25
    resumed.resume()
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.25


def test_a_tied_weight_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    run = ToyRun(tmp_path).advance(1)
    checkpoint = run.save()
    assert manifest_of(checkpoint)["aliases"] == {"head.weight": "embedding.weight"}
    resumed = ToyRun(tmp_path, seed=5)
    resumed.resume()
    assert resumed.model.head.weight is resumed.model.embedding.weight
    assert torch.equal(resumed.model.head.weight, run.model.head.weight)


def test_no_checkpoint(tmp_path: Path) -> None:
    run = ToyRun(tmp_path)
    assert run.store.committed() == []
    run.store.clean()
    assert not run.resume()


def test_manifest(tmp_path: Path) -> None:
    checkpoint = ToyRun(tmp_path).advance(3).save()
    assert checkpoint == tmp_path / "checkpoints" / "step-00000003"
    manifest = manifest_of(checkpoint)
    assert manifest["step"] == manifest["updates"] == 3
    assert manifest["progress"] == {"samples": 30}
    assert manifest["model"] == CONFIG
    assert manifest["finite"] is True
    assert manifest["torch"] == torch.__version__
    sizes = {name: record["bytes"] for name, record in manifest["files"].items()}
    assert sizes == {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.name != "manifest.json"}
    assert {name.split(".")[0] for name in manifest["tensors"]} == {"model", "optimizer"}


def test_keeps_the_last_ones(tmp_path: Path) -> None:
    run = ToyRun(tmp_path, keep=2)
    (run.store.folder.path / "step-00000009").mkdir(parents=True)  # not a checkpoint: neither counted nor deleted
    for _ in range(4):
        run.advance().save()
    assert run.store.committed() == [3, 4]
    assert folders(run) == ["step-00000003", "step-00000004", "step-00000009"]


def test_a_damaged_later_checkpoint_does_not_push_out_a_new_one(tmp_path: Path) -> None:
    run = ToyRun(tmp_path, keep=2)
    for _ in range(4):
        run.advance().save()
    flip_byte(run.store.folder.path / "step-00000004" / "__0_0.distcp")
    run = ToyRun(tmp_path, keep=1)
    assert run.resume()
    assert run.step == 3
    run.store.save(3, run.contents, {"samples": 30})
    assert run.store.committed() == [3, 4]
    run.advance().save()
    assert run.store.committed() == [4]
    assert ToyRun(tmp_path).resume()


def test_never_prunes_the_newest_healthy_one(tmp_path: Path) -> None:
    run = ToyRun(tmp_path, keep=1)
    run.advance().save()
    run.advance().save()
    with torch.no_grad():
        run.model.layers[1].bias[2] = float("nan")
    for _ in range(3):
        run.advance().save()
    assert run.store.committed() == [2, 5]
    assert [manifest_of(run.store.folder.path / name)["finite"] for name in folders(run)] == [True, False]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    run = ToyRun(tmp_path).advance()
    run.save()
    run.store.save(1, run.contents, {"samples": 11})
    assert folders(run) == ["step-00000001"]
    assert run.store.load(1, run.contents) == {"samples": 11}


def test_weights_that_do_not_change_are_an_error(tmp_path: Path) -> None:
    run = ToyRun(tmp_path).advance()
    run.save()
    for state in run.optimizer.state.values():
        state["step"] += 1
    with pytest.raises(SlotMambaError, match="weights at step 2 are those of the checkpoint of step 1"):
        run.store.save(2, run.contents, {})
    assert folders(run) == ["step-00000001"]


def test_skipped_steps_may_leave_the_weights_as_they_were(tmp_path: Path) -> None:
    run = ToyRun(tmp_path).advance()
    run.save()
    run.store.save(2, run.contents, {})
    assert run.store.committed() == [1, 2]


def test_progress_must_be_json(tmp_path: Path) -> None:
    run = ToyRun(tmp_path).advance()
    with pytest.raises(ValueError, match="JSON"):
        run.store.save(1, run.contents, {"loss": float("nan")})
    with pytest.raises(TypeError, match="JSON"):
        run.store.save(1, run.contents, {"loss": torch.zeros(())})
    assert folders(run) == []


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
@pytest.mark.parametrize("damage", [flip_byte, truncate, Path.unlink])
def test_damage_is_noticed_and_the_checkpoint_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    run = ToyRun(tmp_path)
    run.advance().save()
    expected = run.snapshot()
    checkpoint = run.advance().save()
    damage(checkpoint / name)
    with pytest.raises(DamagedCheckpointError, match=name):
        run.store.load(2, run.contents)

    resumed = ToyRun(tmp_path, seed=7)
    with caplog.at_level(logging.WARNING):
        assert resumed.resume()
    assert resumed.step == 1
    assert resumed.snapshot() == expected
    if name == "manifest.json":
        assert run.store.committed() == [1]
    reported = [name]
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("slotmamba.")]
    assert len(messages) == len(reported)
    assert all(word in message and "\n" not in message for word, message in zip(reported, messages, strict=True))


@pytest.mark.parametrize("name", ["__0_0.distcp", "manifest.json"])
def test_damaged_checkpoints_never_become_a_fresh_start(tmp_path: Path, name: str) -> None:
    run = ToyRun(tmp_path)
    for _ in range(2):
        flip_byte(run.advance().save() / name)
    with pytest.raises(SlotMambaError, match="none of the 2 checkpoints"):
        ToyRun(tmp_path).resume()


def test_a_manifest_of_another_step_is_damage(tmp_path: Path) -> None:
    checkpoint = ToyRun(tmp_path).advance().save()
    checkpoint.rename(checkpoint.with_name("step-00000005"))
    with pytest.raises(SlotMambaError, match="none of the 1"):
        ToyRun(tmp_path).resume()


def test_checkpoint_of_another_configuration(tmp_path: Path) -> None:
    run = ToyRun(tmp_path).advance()
    run.save()
    other = CONFIG | {"d_model": 6, "slots": {"factors": 3, "top_k": 1, "balance": 0.5}}
    store = CheckpointStore(tmp_path, 2, other)
    with pytest.raises(ValueError) as caught:
        store.load_latest(run.contents)
    assert str(caught.value) == (
        f"{tmp_path}/checkpoints/step-00000001 is of another model: model.d_model is 5 there and 6 here, "
        "model.slots.factors is 2 there and 3 here, model.slots.balance is null there and 0.5 here"
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda model: setattr(model, "unused", torch.nn.Linear(3, 2)),
            r"model.unused.bias is float32 \[1\] there and",
        ),
        (lambda model: delattr(model, "unused"), "model.unused.bias is .* there and missing here"),
        (lambda model: setattr(model, "new", torch.nn.Linear(1, 1)), "model.new.bias is missing there and"),
        (lambda model: model.half(), "model.embedding.weight is float32 .* there and float16"),
    ],
)
def test_checkpoint_of_another_model(tmp_path: Path, change: Callable[[nn.Module], object], text: str) -> None:
    run = ToyRun(tmp_path).advance()
    run.save()
    change(run.model)
    with pytest.raises(ValueError, match=f"step-00000001 is of another model: {text}"):
        run.resume()


def test_optimizer_state_of_a_parameter_that_is_not_trained(tmp_path: Path) -> None:
    run = ToyRun(tmp_path).advance()
    run.save()
    run.optimizer = torch.optim.AdamW([run.model.temperature])
    with pytest.raises(ValueError, match=r"has optimizer.embedding.weight.exp_avg, but the optimizer"):
        run.resume()


def test_clean_removes_what_dead_processes_left(tmp_path: Path) -> None:
    run = ToyRun(tmp_path)
    run.advance().save()
    # Their numbers may be those of other processes by now, or our own in another container.
    for pid in (2**22 + 1, os.getppid(), os.getpid()):
        for name in (f".tmp-step-00000002-{pid}", f".old-step-00000001-{pid}"):
            (run.store.folder.path / name).mkdir()
            (run.store.folder.path / name / "__0_0.distcp").write_bytes(b"torn")
    run.store.clean()
    assert folders(run) == ["step-00000001"]


def test_clean_finishes_a_commit(tmp_path: Path) -> None:
    run = ToyRun(tmp_path).advance()
    checkpoint = run.save()
    checkpoint.rename(checkpoint.with_name(f".tmp-step-00000001-{os.getpid()}"))
    assert run.store.committed() == []
    run.store.clean()
    assert folders(run) == ["step-00000001"]
    assert run.resume()
