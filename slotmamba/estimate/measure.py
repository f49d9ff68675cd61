"""What activations really take: steps on made-up rows, every allocation counted.

    python -m slotmamba.estimate.measure RECIPE [KEY=VALUE ...]

prints a table of what each way of saving memory costs a recipe, in memory and time, beside the estimate for the device
that it runs on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from slotmamba.config import load_recipe
from slotmamba.config.schema import Recipe
from slotmamba.device import choose_device, compute_precision
from slotmamba.errors import InputError
from slotmamba.estimate.activations import WORKSPACE
from slotmamba.estimate.memory import Memory
from slotmamba.estimate.row import row_shape
from slotmamba.models import build_model
from slotmamba.models.slotmamba import IGNORED, TokenLosses
from slotmamba.tables import table

MIB = 2**20


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch beside weights, gradients and the batch itself.

    kept: when the forward pass is done; peak: the most at any moment of forward and backward pass; seconds: that both
    took after a first time.
    """

    kept: int
    peak: int
    seconds: float


def measure(recipe: Recipe, device: torch.device) -> Activations:
    """Runs the forward and backward pass of a micro-batch of random tokens, in documents of 3/8 of a row."""
    model = build_model(recipe.model).to(device)
    model.save_memory(recipe.train.activation_checkpointing, recipe.train.sequence_chunks)
    batch = {name: tensor.to(device) for name, tensor in _batch(recipe).items()}
    found: list[TokenLosses] = []

    def forward() -> None:
        with compute_precision(device, recipe.train.precision):
            found.append(model.losses(**batch))

    def step() -> None:
        forward()
        losses = found.pop()
        (losses.nll.sum() + losses.balance).backward()

    step()  # makes the gradients
    seconds = _seconds(step, device)
    kept, _ = _allocated(forward, device)
    found.clear()
    return Activations(kept, _allocated(step, device)[1], seconds)


def estimated(memory: Memory) -> tuple[float, float]:
    """What the estimate says of `kept` and `peak`."""
    peak = sum(memory.activations.values()) + memory.boundary_states + memory.autocast
    return peak - memory.activations[WORKSPACE], peak


def _batch(recipe: Recipe) -> dict[str, Tensor]:
    shape, row = (recipe.train.micro_batch, recipe.data.seq_len), row_shape(recipe)
    ids = torch.randint(recipe.model.vocab_size, (2, *shape))
    labels = torch.where(torch.rand(shape) < row.labelled, ids[1], IGNORED)
    document = max(1, 3 * shape[1] // 8)
    doc_start = (torch.arange(shape[1]) // document * document).expand(shape)
    batch = {"input_ids": ids[0], "labels": labels, "doc_start": doc_start}
    if row.padded:
        batch["valid"] = torch.ones(shape).bool()
    if row.encoder_tokens:
        encoder = torch.randint(recipe.model.vocab_size, (shape[0], row.encoder_tokens))
        batch |= {"encoder_ids": encoder, "encoder_valid": torch.ones_like(encoder).bool()}
    return batch


def _allocated(function: Callable[[], None], device: torch.device) -> tuple[int, int]:
    """Bytes that the device's allocator has given out and not got back when the function is done, and at most."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.memory_allocated(device) - before, torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [each for each in recorded.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return now, most


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    start = time.monotonic()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - start


def _variants(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with every mode, and with 2, 4, 8, ... chunks, as far as there are so many."""
    settings = [("none", 1), ("selective", 1), ("block", 1)]
    chunks = 2
    while chunks <= min(recipe.model.most_chunks(recipe.data.seq_len), 64):
        settings += [("none", chunks), ("selective", chunks)]
        chunks *= 2
    for mode, count in settings:
        keys = {"activation_checkpointing": mode, "sequence_chunks": count}
        yield _with(recipe, **keys)


def _with(recipe: Recipe, **train: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


def main(arguments: list[str]) -> int:
    """Prints the table for the recipe and overrides given. Returns the exit code."""
    from slotmamba.estimate import estimate

    if not arguments:
        print(__doc__)
        return 2
    try:
        recipe = load_recipe(arguments[0], arguments[1:])
        device = choose_device(recipe.train.device, "train.device")
        recipe = _with(recipe, device=device.type)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = []
    for variant in _variants(recipe):
        found, (kept, peak) = measure(variant, device), estimated(estimate(variant).memory)
        train = variant.train
        rows.append(
            (f"{train.activation_checkpointing}, {train.sequence_chunks}", f"{found.kept / MIB:,.1f}",
             f"{kept / MIB:,.1f}", f"{found.peak / MIB:,.1f}", f"{peak / MIB:,.1f}", f"{found.seconds:.2f}")
        )  # fmt: skip
    header = ("mode, chunks", "kept, MiB", "estimate", "peak, MiB", "estimate", "seconds")
    print(table(header, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
