"""What activations really take: a step on made-up rows, every allocation counted. `python -m` prints a table."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from slotmamba.config import load_recipe
from slotmamba.config.schema import Recipe
from slotmamba.device import compute_precision
from slotmamba.estimate import estimate
from slotmamba.estimate.row import row_shape
from slotmamba.models import SlotMamba, build_model
from slotmamba.models.slotmamba import IGNORED, TokenLosses
from slotmamba.tables import table

MODES = (("none", 1), ("selective", 1), ("block", 1), ("none", 2), ("none", 4), ("none", 8), ("selective", 8))


@dataclass(frozen=True)
class Activations:
    """Bytes beside weights, gradients and the batch, on a CPU.

    kept: when the forward pass is done; peak: the most at any moment of forward and backward pass.
    """

    kept: int
    peak: int


def measure(recipe: Recipe) -> Activations:
    """Runs the forward and backward pass of a micro-batch of random tokens on the CPU, in documents of 3/8 of a row."""
    model = build_model(recipe.model)
    model.save_memory(recipe.train.activation_checkpointing, recipe.train.sequence_chunks)
    batch = _batch(recipe)
    found: list[TokenLosses] = []

    def forward() -> None:
        with compute_precision(torch.device("cpu"), recipe.train.precision):
            found.append(model.losses(**batch))

    def step() -> None:
        forward()
        losses = found.pop()
        (losses.nll.sum() + losses.balance).backward()

    step()  # makes the gradients
    kept, _ = _allocated(forward)
    found.clear()
    return Activations(kept, _allocated(step)[1])


def _batch(recipe: Recipe) -> dict[str, Tensor]:
    shape, row = (recipe.train.micro_batch, recipe.data.seq_len), row_shape(recipe)
    ids = torch.randint(recipe.model.vocab_size, (2, *shape))
    labels = torch.where(torch.rand(shape) < row.labelled, ids[1], IGNORED)
    document = max(1, 3 * shape[1] // 8)
    doc_start = (torch.arange(shape[1]) // document * document).expand(shape)
    batch = {"input_ids": ids[0], "labels": labels, "doc_start": doc_start, "valid": torch.ones(shape).bool()}
    if row.encoder_tokens:
        encoder = torch.randint(recipe.model.vocab_size, (shape[0], row.encoder_tokens))
        batch |= {"encoder_ids": encoder, "encoder_valid": torch.ones_like(encoder).bool()}
    return batch


def _allocated(function: Callable[[], None]) -> tuple[int, int]:
    """Bytes that PyTorch's CPU allocator has given out and not got back when the function is done, and at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [each for each in recorded.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return now, most
