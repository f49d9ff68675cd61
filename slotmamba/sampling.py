"""Decoding token by token: which token to take from the logits, and the loop around a model's `step`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slotmamba.errors import InputError

if TYPE_CHECKING:
    from slotmamba.models import SlotMamba
    from slotmamba.models.decoder import DecoderState


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises InputError for a negative temperature, a top_k below 1 or a top_p outside (0, 1]."""
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature={temperature}: expected a number of at least 0; 0 takes the likeliest token")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k={top_k}: expected at least 1 token to draw from")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p}: expected more than 0 and at most 1")


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one token for every row.

    The logits are divided by the temperature; then only the top_k likeliest tokens stay; then, of those renormalised,
    only the smallest set of likeliest tokens whose probability reaches top_p, at least one (nucleus sampling, Holtzman
    et al.,
    arXiv:1904.09751). Of equally likely tokens the one with the smaller number goes first.

    Args:
        logits: [B, V].
        temperature: 0 takes the likeliest token.
        top_k, top_p: None leaves the filter out.
        generator: random numbers, on the logits' device; None is torch's own.

    Returns:
        Tokens [B], int64.

    Raises:
        InputError: temperature, top_k or top_p out of range.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()
    # The largest is 0 before it is divided, so that no temperature, however small, makes two infinities of two logits.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    probabilities, tokens = scaled.softmax(-1).sort(stable=True, dim=-1, descending=True)
    if top_k is not None:
        probabilities = probabilities[:, :top_k] / probabilities[:, :top_k].sum(-1, keepdim=True)
    if top_p is not None:
        # A token stays as long as those before it have not reached top_p; the first always does.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = torch.where(before < top_p, probabilities, 0)
    drawn = probabilities.multinomial(1, generator=generator)  # needs no normalised rows
    return tokens.gather(-1, drawn).squeeze(-1)


@torch.no_grad()
def generate_tokens(
    model: SlotMamba,
    state: DecoderState,
    input_ids: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
) -> Iterator[Tensor]:
    """Tokens [B] after input_ids, one after the other without end, by `step` only.

    Args:
        model: in the mode it is in; nothing here needs gradients.
        state: from the model's `init_state`.
        input_ids: [B, T >= 1], fed by `step` as well.
        temperature, top_k, top_p: as for `sample`.
        seed: of the draws; the same seed, device and batch give the same tokens.
        vocab_size: draw from the tokens below this number only; None is all.

    Raises:
        InputError: sampling arguments out of range.
        ValueError: input_ids without tokens.
    """
    check_sampling(temperature, top_k, top_p)
    if input_ids.ndim != 2 or not input_ids.shape[1]:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}, expected [B, T] with at least one token")
    generator = torch.Generator(input_ids.device).manual_seed(seed)
    # The caller's state stays as it is; those that the steps return are nobody else's.
    first, *others = input_ids.unbind(1)
    logits, state = model.step(first, state)
    for token in others:
        logits, state = model.step(token, state, consume=True)
    while True:
        token = sample(logits[:, :vocab_size], temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        yield token
        logits, state = model.step(token, state, consume=True)


def generate(
    model: SlotMamba,
    state: DecoderState,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    eos_id: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Tensor:
    """input_ids [B, T >= 1] with up to max_new_tokens more, [B, T + new].

    Ends early once every row has had its eos_id; a row that has goes on with eos_id to the length of the longest. The
    other arguments, and the errors, are those of `generate_tokens`.
    """
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    drawn = generate_tokens(model, state, input_ids, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    columns = [input_ids]
    for token in islice(drawn, max_new_tokens):
        if eos_id is not None:
            token = torch.where(ended, eos_id, token)
            ended |= token == eos_id
        columns.append(token.unsqueeze(1))
        if bool(ended.all()):
            break
    return torch.cat(columns, 1)
