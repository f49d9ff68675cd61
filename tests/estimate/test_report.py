"""Parameters by part, the shape of rows, totals, and the report of every recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slotmamba.config import installed_recipes, load_recipe
from slotmamba.config.schema import ModelConfig
from slotmamba.estimate import estimate, report
from slotmamba.estimate.row import RowShape, row_shape
from slotmamba.models import SlotMambaForSeq2Seq, build_model
from tests.estimate.recipes import ENCODER, TINY, recipe_of


@pytest.mark.parametrize(
    "model",
    [TINY, TINY | {"tie_embeddings": False}, {"decoder_layers": 1}, TINY | ENCODER | {"vocab_size": 64}],
    ids=["decoder", "untied", "defaults", "encoder-decoder"],
)
def test_parameters_are_those_of_the_model(model: dict[str, Any]) -> None:
    found = estimate(recipe_of(model))
    real = build_model(ModelConfig.model_validate(model))
    assert found.total_parameters == sum(parameter.numel() for parameter in real.parameters())

    def size(*modules: torch.nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    layers = list(real.decoder.layers)
    injections = [layer.slots.injection for layer in layers if layer.slots.injection is not None]
    expected = {
        "embedding": size(real.embedding),
        "attention": size(*(layer.attention for layer in layers if layer.attention is not None)),
        "BD-LRU": size(*(layer.lru for layer in layers)),
        "slot memory": size(*(layer.slots for layer in layers)) - size(*injections),
        "injection": size(*injections),
        "MLP": size(*(layer.mlp for layer in layers if layer.mlp is not None)),
        "output": 0 if real.config.tie_embeddings else size(real.output),
    }
    if isinstance(real, SlotMambaForSeq2Seq):
        mamba, attentive = real.encoder.layers
        expected |= {
            "encoder Mamba-2": size(mamba.mixer),
            "encoder attention": size(attentive.mixer),
            "encoder MLP": size(mamba.mlp, attentive.mlp),
        }
    norms = found.total_parameters - sum(expected.values())
    assert found.parameters == {key: number for key, number in expected.items() if number} | {"norms": norms}
    assert norms % real.config.d_model == 0 and norms > 0


def test_rows_of_a_recipe() -> None:
    assert row_shape(recipe_of(TINY)) == RowShape(12, 0, 1.0, padded=False)
    # The encoder's row is that of 9 pairs; 8 and 4 queries in rows of 12, half of the rows each.
    assert row_shape(recipe_of(TINY | ENCODER | {"vocab_size": 64})) == RowShape(12, 20, 0.5, padded=True)
    settings = [{"length": 16, "pairs": 4}, {"length": 40, "pairs": 8, "weight": 3}]
    recall = {"name": "recall", "kind": "mqar", "mqar": {"vocab_size": 64, "settings": settings}, "weight": 2}
    text = {"name": "text", "shards": "nowhere"}
    mixed = recipe_of(TINY | {"vocab_size": 64}, 40, data={"seq_len": 40, "sources": [recall, text]})
    # Rows of 16 hold two samples, 8 labels; rows of 40 one sample, 8 labels as well; text has labels everywhere.
    assert row_shape(mixed).labelled == pytest.approx((2 * 8 / 40 + 1) / 3, rel=1e-12)


def test_totals() -> None:
    found = estimate(recipe_of(TINY))
    assert found.training_flops == 3 * found.forward_flops
    assert found.run_flops == found.training_flops * 48 * 10


@pytest.mark.parametrize("name", installed_recipes())
def test_installed_recipes_can_be_estimated(name: str) -> None:
    recipe = load_recipe(name)
    found, text = estimate(recipe), report(recipe)
    assert f"{found.total_parameters:,}" in text and f"{found.forward_flops:,.0f}" in text
    for part in (*found.parameters, *(key.rpartition(": ")[2] for key in found.forward), *found.memory.activations):
        assert any(line.strip().startswith(f"{part} ") for line in text.splitlines()), part
    assert max(map(len, text.splitlines())) <= 100
