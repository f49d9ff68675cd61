"""No logit depends on a later token, and a packed document gives what it gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.model_cases import (
    LENGTH,
    OPTIONS,
    SEGMENT,
    SEQ2SEQ_OPTIONS,
    decoder_only,
    document_starts,
    random_document_starts,
    seq2seq,
    tokens,
)
from tests.seeds import seed_afresh

for_every_option = pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS.keys())


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


# Causality


@torch.no_grad()
@for_every_option
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_no_future_token_changes_a_past_logit(changes: dict[str, Any], packed: bool, padded: bool) -> None:
    """Bitwise, with the future beginning in the first segment and in a later one."""
    seed_afresh()
    model = decoder_only(**changes)
    input_ids, others = tokens(2, LENGTH), tokens(2, LENGTH)
    options = {
        "doc_start": random_document_starts(2, LENGTH) if packed else None,
        "valid": torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 4]]) if padded else None,
    }
    logits = model(input_ids, **options)
    for now in (int(torch.randint(1, SEGMENT, ())), int(torch.randint(SEGMENT, LENGTH, ()))):
        others[:, now] = (input_ids[:, now] + 1) % model.config.vocab_size
        changed = model(torch.cat([input_ids[:, :now], others[:, now:]], 1), **options)
        assert torch.equal(changed[:, :now], logits[:, :now])
        assert not torch.equal(changed[0, now], logits[0, now])


@torch.no_grad()
@pytest.mark.parametrize("changes", SEQ2SEQ_OPTIONS.values(), ids=SEQ2SEQ_OPTIONS.keys())
def test_no_future_token_changes_a_past_logit_with_an_encoder(changes: dict[str, Any]) -> None:
    seed_afresh()
    model = seq2seq(**changes)
    input_ids, others, encoder_ids = tokens(2, LENGTH), tokens(2, LENGTH), tokens(2, 9)
    logits = model(input_ids, encoder_ids)
    for now in (int(torch.randint(1, SEGMENT, ())), int(torch.randint(SEGMENT, LENGTH, ()))):
        changed = torch.cat([input_ids[:, :now], others[:, now:]], 1)
        assert torch.equal(model(changed, encoder_ids)[:, :now], logits[:, :now])


@for_every_option
def test_no_gradient_reaches_a_later_token(changes: dict[str, Any]) -> None:
    seed_afresh()
    model = decoder_only(**changes)
    x = model.embedding(tokens(1, LENGTH)).detach().requires_grad_()
    hidden, _ = model.decoder(x)
    for now in (0, SEGMENT - 1, SEGMENT, LENGTH - 2):
        (gradient,) = torch.autograd.grad(hidden[:, now].square().sum(), x, retain_graph=True)
        assert not gradient[:, now + 1 :].any() and gradient[:, now].any()


@torch.no_grad()
def test_the_past_reaches_across_segments() -> None:
    """The first token still matters in the fourth segment, so that what the tests above find equal is not trivial."""
    seed_afresh()
    model = decoder_only()
    input_ids = tokens(2, LENGTH)
    changed = input_ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % model.config.vocab_size
    assert not torch.equal(model(changed)[:, 3 * SEGMENT :], model(input_ids)[:, 3 * SEGMENT :])


# Documents. Segments are counted along the row, so with threading a document's logits depend on where in a segment it
# starts. What holds exactly is tested: without threading always; with it, for documents inside one segment, and for
# documents that start at the same place of a segment. Seeds are fixed: two slots may weigh the same to within rounding,
# and other shapes round differently.


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {**changes, "slots": {**changes.get("slots", {}), "thread_layers": False}}
        for name, changes in OPTIONS.items()
        if "not threaded" not in name
    ],
    ids=[name for name in OPTIONS if "not threaded" not in name],
)
def test_packed_documents_equal_the_documents_alone(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = decoder_only(**changes)
    rows = [[0, 3, 4, 11], [0, 16], [0]]
    input_ids = tokens(len(rows), LENGTH)
    logits = model(input_ids, doc_start=document_starts(rows, LENGTH))
    for row, starts in enumerate(rows):
        for start, stop in zip(starts, [*starts[1:], LENGTH], strict=True):
            assert_close(logits[row, start:stop], model(input_ids[row : row + 1, start:stop])[0])


@torch.no_grad()
@for_every_option
def test_threaded_documents_inside_a_segment_equal_the_documents_alone(changes: dict[str, Any]) -> None:
    """Of one token, of a whole segment, up to a segment's end and from its start, with others in between."""
    torch.manual_seed(1)
    model = decoder_only(**changes)
    segment = model.config.slots.segment_len
    starts = [0, 1, 3, 5, 10, 11, 14, 15]
    input_ids = tokens(2, LENGTH)
    logits = model(input_ids, doc_start=document_starts([starts, [0, 2]], LENGTH))
    inside = 0
    for start, stop in zip(starts, [*starts[1:], LENGTH], strict=True):
        if start // segment == (stop - 1) // segment:
            assert_close(logits[0, start:stop], model(input_ids[:1, start:stop])[0])
            inside += 1
    assert inside >= 2


@torch.no_grad()
@for_every_option
@pytest.mark.parametrize("place", [0, 3])
def test_threaded_documents_depend_on_their_place_in_a_segment_only(changes: dict[str, Any], place: int) -> None:
    """A document over several segments, at two places a segment apart and after other documents, gives the same."""
    torch.manual_seed(place)
    model = decoder_only(**changes)
    segment = model.config.slots.segment_len
    document = tokens(2 * SEGMENT + 3)
    logits = []
    for start in (place, place + segment):
        row = torch.cat([tokens(start), document]).unsqueeze(0)
        starts = [0, start] if start else [0]
        logits.append(model(row, doc_start=document_starts([starts], row.shape[1]))[0, start:])
    assert_close(logits[0], logits[1])


@torch.no_grad()
def test_threading_makes_a_difference() -> None:
    """The same document at two places of a segment: what the last test's condition is for."""
    torch.manual_seed(2)
    model = decoder_only()
    document = tokens(1, 2 * SEGMENT)
    shifted = torch.cat([tokens(1, 2), document], 1)
    moved = model(shifted, doc_start=document_starts([[0, 2]], 2 + 2 * SEGMENT))[:, 2:]
    alone = model(document)
    assert_close(moved[:, : SEGMENT - 2], alone[:, : SEGMENT - 2])
    assert (moved - alone)[:, SEGMENT:].abs().max() > 1e-3


# Padding


@torch.no_grad()
@for_every_option
def test_padding_changes_nothing(changes: dict[str, Any]) -> None:
    """Neither what the padding holds, bitwise, nor that it is there; in the balance term as well."""
    torch.manual_seed(3)
    model = decoder_only(**changes)
    input_ids, others = tokens(2, LENGTH), tokens(2, LENGTH)
    length = LENGTH - 6
    valid = (torch.arange(LENGTH) < length).expand(2, LENGTH)
    doc_start = document_starts([[0], [0, 4]], LENGTH)
    labels = torch.where(valid, tokens(2, LENGTH), -100)
    padded = model.losses(input_ids, labels, doc_start=doc_start, valid=valid)
    other_padding = model.losses(torch.where(valid, input_ids, others), labels, doc_start=doc_start, valid=valid)
    shorter = model.losses(input_ids[:, :length], labels[:, :length], doc_start=doc_start[:, :length])
    assert torch.equal(padded.nll, other_padding.nll) and torch.equal(padded.balance, other_padding.balance)
    assert_close(padded.nll, shorter.nll)
    assert_close(padded.balance, shorter.balance)


@torch.no_grad()
def test_tokens_after_padding_do_not_see_it() -> None:
    """But for the taps of the address convolution, which this model has none of."""
    seed_afresh()
    model = decoder_only(decoder_attn_layer=-2, slots={"address_conv": 1})
    input_ids, others = tokens(2, LENGTH), tokens(2, LENGTH)
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[:, 4:8] = False
    logits = model(input_ids, valid=valid)
    changed = model(torch.where(valid, input_ids, others), valid=valid)
    assert torch.equal(logits[valid], changed[valid])
    assert not torch.equal(logits[~valid], changed[~valid])
