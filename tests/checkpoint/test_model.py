"""`slotmamba.load` on checkpoints of real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slotmamba
from slotmamba.checkpoint import (
    CheckpointStore,
    DamagedCheckpointError,
    TensorContents,
    find_checkpoint,
    open_checkpoint,
    recipe_path,
)
from slotmamba.checkpoint.manifest import read_manifest, write_manifest
from slotmamba.config.schema import ModelConfig, OptimConfig
from slotmamba.errors import InputError, SlotMambaError
from slotmamba.models import build_model
from slotmamba.optim import build_optimizer

SLOTS = {"factors": 2, "factor_size": 2, "top_k": 2}
DECODER = {"vocab_size": 11, "d_model": 8, "n_heads": 2, "decoder_layers": 2, "decoder_attn_layer": -2, "slots": SLOTS}
ENCODER = {"encoder_layers": 1, "decoder_inject_layers": [0], "ssm": {"state_size": 4, "head_dim": 8}}
CONFIGS = {
    "decoder": DECODER,
    "untied": DECODER | {"tie_embeddings": False},
    "encoder-decoder": DECODER | ENCODER,
}


def save_run(run_dir: Path, values: dict[str, Any], steps: int = 2) -> nn.Module:
    config = ModelConfig.model_validate(values)
    torch.manual_seed(1)
    model = build_model(config)
    optimizer = build_optimizer(model, OptimConfig())
    store = CheckpointStore(run_dir, 3, config.model_dump(mode="json"))
    for step in range(1, steps + 1):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        store.save(step, TensorContents(model, optimizer), {})
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_load_from_any_of_the_paths(tmp_path: Path, name: str) -> None:
    model = save_run(tmp_path, CONFIGS[name])
    checkpoints = tmp_path / "checkpoints"
    for path in (tmp_path, str(tmp_path), checkpoints, checkpoints / "step-00000002"):
        loaded = slotmamba.load(path)
        assert type(loaded) is type(model)
        assert not any(module.training for module in loaded.modules())
        expected = model.state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
        assert len(list(loaded.parameters())) == len(list(model.parameters())), "tied weights came apart"
    earlier = slotmamba.load(checkpoints / "step-00000001").state_dict()
    assert not any(torch.equal(earlier[key], value) for key, value in expected.items() if value.is_floating_point())


def test_loading_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    save_run(tmp_path, DECODER)
    before = torch.get_rng_state()
    slotmamba.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_a_damaged_checkpoint(tmp_path: Path, name: str) -> None:
    save_run(tmp_path, DECODER)
    path = tmp_path / "checkpoints" / "step-00000002" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match=name):
        slotmamba.load(path.parent)


@pytest.mark.parametrize("name", ["__0_0.distcp", "manifest.json"])
def test_a_run_with_a_damaged_newest_checkpoint(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """As training resumes: from the one before, with a line that says why."""
    save_run(tmp_path, DECODER)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-00000002" / name).unlink()
    expected = slotmamba.load(checkpoints / "step-00000001").state_dict()
    for path in (tmp_path, checkpoints):
        caplog.clear()
        model, folder = open_checkpoint(path)
        assert folder == checkpoints / "step-00000001"
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
        (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert line.startswith(f"checkpoint of step 2 is skipped: {checkpoints / 'step-00000002' / name}")
    (checkpoints / "step-00000001" / name).unlink()
    with pytest.raises(SlotMambaError, match=f"none of the 2 checkpoints in {checkpoints} can be loaded"):
        slotmamba.load(tmp_path)


def test_a_checkpoint_of_another_version(tmp_path: Path) -> None:
    save_run(tmp_path, DECODER, steps=1)
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    manifest = read_manifest(checkpoint)
    manifest.model["slots"]["shape"] = "round"
    write_manifest(checkpoint, manifest)
    with pytest.raises(InputError, match=r"step-00000001: this version has no such model: model\.slots\.shape: "):
        slotmamba.load(tmp_path)


def test_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"^{path} has no checkpoint: expected a run folder, its `checkpoints`"):
            slotmamba.load(path)


def test_recipe_path(tmp_path: Path) -> None:
    save_run(tmp_path, DECODER, steps=1)
    with pytest.raises(ValueError, match=r"recipe\.yaml is missing"):
        recipe_path(tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: a")
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    assert find_checkpoint(tmp_path) == checkpoint
    for path in (tmp_path, tmp_path / "checkpoints", checkpoint):
        assert recipe_path(path) == (tmp_path / "recipe.yaml").resolve()
