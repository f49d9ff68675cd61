"""The model of every installed recipe learns with all of its parameters."""

from __future__ import annotations

import pytest
import torch

from slotmamba.config import installed_recipes, load_recipe
from slotmamba.models import build_model
from slotmamba.optim import build_optimizer
from tests.seeds import seed_afresh

STEPS = 3
ROWS = 8  # enough for a slot to be met in all three segments
# Not those that only spread another one over processes. Large models are narrowed: nothing here depends on the width.
RECIPES = [name for name in installed_recipes() if load_recipe(name).parallel.size == 1]
WIDEST = 256


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_has_a_gradient_within_three_steps(name: str) -> None:
    """On random tokens, over three segments, which the recipe's rows have to have as well: the lowest layer's surprise,
    measured in the first, is mixed into that of the layer above for the second, which opens its gate to the third.
    Segments are shorter than the recipe's to save time; no parameter's shape depends on their length."""
    seed_afresh()
    recipe = load_recipe(name)
    slots = recipe.model.slots
    assert recipe.data.seq_len > 2 * slots.segment_len
    segment = min(slots.segment_len, 16)
    update: dict[str, object] = {"slots": slots.model_copy(update={"segment_len": segment})}
    if recipe.model.d_model > WIDEST:
        update |= {"d_model": WIDEST, "n_heads": 2, "vocab_size": min(recipe.model.vocab_size, 1024)}
    config = recipe.model.model_copy(update=update)
    length = 3 * segment
    model = build_model(config)
    optimizer = build_optimizer(model, recipe.optim)
    still = {name for name, _ in model.named_parameters()}
    for _ in range(STEPS):
        tokens = torch.randint(config.vocab_size, (2, ROWS, length))
        inputs = {"input_ids": tokens[0], "labels": tokens[1]}
        if config.encoder_layers:
            inputs["encoder_ids"] = torch.randint(config.vocab_size, (ROWS, 20))
        losses = model.losses(**inputs)
        optimizer.zero_grad()
        (losses.nll.mean() + config.slots.balance * losses.balance).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.isfinite().all(), name
                if parameter.grad.any():
                    still.discard(name)
        if not still:
            break
        optimizer.step()
    assert not still, f"no gradient within {STEPS} steps"
