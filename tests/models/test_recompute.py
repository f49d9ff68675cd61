"""Activation checkpointing and chunks of the sequence: the same values and gradients from less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from slotmamba.config.schema import ModelConfig, OptimConfig
from slotmamba.models import SlotMamba
from slotmamba.models.recompute import _keep_products, chunked, run_layer
from slotmamba.optim import build_optimizer
from tests.models.model_cases import (
    OPTIONS,
    SEGMENT,
    SEQ2SEQ_OPTIONS,
    config,
    decoder_only,
    random_document_starts,
    seq2seq,
    tokens,
)
from tests.seeds import seed_afresh

ROWS, LENGTH = 3, 8 * SEGMENT + 2  # nine segments, the last of two tokens

CASES = [pytest.param(False, changes, id=name) for name, changes in OPTIONS.items()]
CASES += [pytest.param(True, changes, id=f"encoder: {name}") for name, changes in SEQ2SEQ_OPTIONS.items()]
for_every_model = pytest.mark.parametrize(("encoder", "changes"), CASES)

BOTH = pytest.mark.parametrize("encoder", [False, True], ids=["", "encoder"])
BUSY: dict[str, Any] = {"decoder_attn_layer": -2, "mlp_ratio": 1.5, "slots": {"householder_steps": 2}}


def build(encoder: bool, changes: dict[str, Any]) -> SlotMamba:
    return (seq2seq if encoder else decoder_only)(**copy.deepcopy(changes))


def batch(encoder: bool, packed: bool = True) -> dict[str, Tensor]:
    labels = torch.where(torch.rand(ROWS, LENGTH) < 0.7, tokens(ROWS, LENGTH), -100)
    inputs = {"input_ids": tokens(ROWS, LENGTH), "labels": labels}
    if packed:
        inputs["doc_start"] = random_document_starts(ROWS, LENGTH)
        inputs["valid"] = torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 7], [3]])
    if encoder:
        valid = torch.arange(9) < torch.tensor([[9], [4], [7]])
        inputs |= {"encoder_ids": tokens(ROWS, 9), "encoder_valid": valid}
    return inputs


def loss_of(model: SlotMamba, inputs: dict[str, Tensor]) -> Tensor:
    losses = model.losses(**inputs)
    return losses.nll.mean() + 1e-3 * losses.z.mean() + 0.05 * losses.balance


def gradients(model: SlotMamba, inputs: dict[str, Tensor], mode: Any, chunks: int) -> dict[str, Tensor]:
    """The loss and the gradients of all parameters."""
    model.save_memory(mode, chunks)
    model.zero_grad()
    loss = loss_of(model, inputs)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return {"loss": loss.detach(), **{name: gradient.clone() for name, gradient in found.items()}}


# Values


@BOTH
def test_activation_checkpointing_changes_no_bit_under_autocast(encoder: bool) -> None:
    seed_afresh()
    model, inputs = build(encoder, BUSY), batch(encoder)
    with torch.autocast("cpu", torch.bfloat16):
        want = gradients(model, inputs, "none", 1)
        for mode, chunks in (("block", 1), ("selective", 1)):
            got = gradients(model, inputs, mode, chunks)
            assert all(torch.equal(got[name], want[name]) for name in want), mode


@for_every_model
def test_gradients(encoder: bool, changes: dict[str, Any]) -> None:
    check_gradients(build(encoder, changes), encoder, packed=True, chunkings=(("none", 2), ("selective", 8)))


@BOTH
def test_gradients_of_one_document(encoder: bool) -> None:
    check_gradients(build(encoder, BUSY), encoder, packed=False, chunkings=(("block", 3), ("none", 9)))


def check_gradients(model: SlotMamba, encoder: bool, packed: bool, chunkings: Any) -> None:
    """In float64: bitwise equal with activation checkpointing, and with chunks, of unequal lengths, to 1e-9 of the
    largest gradient of a parameter."""
    seed_afresh()
    model, inputs = model.double(), batch(encoder, packed)
    want = gradients(model, inputs, "none", 1)
    for mode in ("block", "selective"):
        got = gradients(model, inputs, mode, 1)
        assert all(torch.equal(got[name], want[name]) for name in want), mode
    for mode, chunks in chunkings:
        got = gradients(model, inputs, mode, chunks)
        for name in want:
            error = (got[name] - want[name]).abs().max() / want[name].abs().max().clamp(min=1e-12)
            assert error < 1e-9, (name, chunks, float(error))


def losses_of_training(encoder: bool, mode: Any, chunks: int) -> list[float]:
    """Of 20 steps, each on a batch of its own."""
    torch.manual_seed(5)
    model = build(encoder, BUSY | ({"decoder_inject_layers": [1]} if encoder else {}) | {"decoder_layers": 2})
    model.save_memory(mode, chunks)
    optimizer = build_optimizer(model, OptimConfig(lr=3e-3))
    found = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(model, batch(encoder))
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.slow
@BOTH
def test_losses_of_20_steps(encoder: bool) -> None:
    """Bitwise with activation checkpointing; chunks, whose sums are taken in another order, to 1e-5."""
    want = losses_of_training(encoder, "none", 1)
    assert want[-1] < want[0]
    for mode in () if encoder else ("block", "selective"):
        assert losses_of_training(encoder, mode, 1) == want
    for chunks in (8,) if encoder else (2, 8):
        assert losses_of_training(encoder, "none", chunks) == pytest.approx(want, rel=1e-5)


@BOTH
@pytest.mark.parametrize("changes", [{}, {"decoder_layers": 1}, BUSY], ids=["threaded", "one layer", "attention"])
def test_gradients_flow_from_the_last_chunk_to_the_first(encoder: bool, changes: dict[str, Any]) -> None:
    """One document: the loss of the last segment's tokens reaches every token of the first one, as without chunks."""
    seed_afresh()
    changes = changes | ({"decoder_inject_layers": [0]} if encoder else {})
    model, inputs = build(encoder, changes).double(), batch(encoder, packed=False)
    inputs["labels"] = tokens(ROWS, LENGTH)
    inputs["labels"][:, : 8 * SEGMENT] = -100
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda module, ids, output: embedded.append(output))
    found = []
    for chunks in (1, 9):
        model.save_memory("none", chunks)
        loss = loss_of(model, inputs)
        found.append(torch.autograd.grad(loss, embedded[-1])[0][:, :SEGMENT])
    assert (found[0].abs().amax(-1) > 0).all()
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-14)


@torch.no_grad()
@BOTH
def test_without_gradients_nothing_changes(encoder: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation and generation: the same bits as without, and neither chunks nor checkpoints."""
    seed_afresh()
    model, inputs = build(encoder, BUSY), batch(encoder)
    encoded = {name: x for name, x in inputs.items() if name.startswith("encoder_")}
    losses, text = model.losses(**inputs), model.generate(inputs["input_ids"][:, :4], 6, **encoded)
    model.save_memory("selective", 8)
    monkeypatch.setattr("slotmamba.models.recompute.checkpoint", None)
    again = model.losses(**inputs)
    assert torch.equal(again.nll, losses.nll) and torch.equal(again.balance, losses.balance)
    assert torch.equal(model.generate(inputs["input_ids"][:, :4], 6, **encoded), text)


# Chunks


@pytest.mark.parametrize(("length", "count"), [(42, 1), (42, 2), (42, 8), (42, 9), (5, 1), (3, 1), (45, 4)])
def test_chunks_are_whole_segments_and_about_equal(length: int, count: int) -> None:
    chunks = chunked(config(), length, count)
    assert len(chunks) == count
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
    assert chunks[-1].stop == length
    assert all(chunk.start % SEGMENT == 0 for chunk in chunks)
    sizes = [-(-(chunk.stop - chunk.start) // SEGMENT) for chunk in chunks]
    assert max(sizes) - min(sizes) <= 1


def test_chunks_without_segments_are_tokens() -> None:
    alone: ModelConfig = config(decoder_layers=1)
    assert chunked(alone, 7, 3) == [slice(0, 2), slice(2, 4), slice(4, 7)]
    assert chunked(alone, 7, 1) == [slice(0, 7)]


def test_too_many_chunks() -> None:
    with pytest.raises(ValueError, match="sequence_chunks=10, but a sequence of 42 tokens has at most 9"):
        chunked(config(), 42, 10)
    with pytest.raises(ValueError, match="a sequence of 7 tokens has at most 7"):
        chunked(config(decoder_layers=1), 7, 8)
    model = decoder_only()
    model.save_memory("none", 9)
    with pytest.raises(ValueError, match="sequence_chunks=9"):
        model.losses(tokens(1, 10), tokens(1, 10))


# What is kept


def test_selective_recomputes_all_but_products() -> None:
    """A product is multiplied once forward and twice backward, for its two gradients; `block` makes it once more."""
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    for mode, products, tanhs in (("none", 3, 1), ("selective", 3, 2), ("block", 4, 2)):
        with Calls() as calls:
            run_layer(mode, lambda x, weight: (x @ weight).tanh().exp(), x, weight).sum().backward()
        assert calls.of == {torch.ops.aten.mm.default: products, torch.ops.aten.tanh.default: tanhs}, mode


class Calls(TorchDispatchMode):
    """Counts products and hyperbolic tangents."""

    def __init__(self) -> None:
        super().__init__()
        self.of = dict.fromkeys((torch.ops.aten.mm.default, torch.ops.aten.tanh.default), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.of:
            self.of[func] += 1
        return func(*args, **(kwargs or {}))


def test_products_overwritten_after_they_were_kept_are_made_again() -> None:
    """As ZeRO-3's linear layers do, through a view that autograd does not know to be one."""

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            y = x.matmul(weight)
            y += bias
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            return grad @ weight.T, (x.transpose(1, 2) @ grad).sum(0), grad.sum((0, 1))

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return Linear.apply(x, weight, bias).sigmoid() * (x @ weight).tanh()

    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 4), (4, 5), (5,))]
    want = torch.autograd.grad(layer(*leaves).square().sum(), leaves)
    again = checkpoint(layer, *leaves, use_reentrant=False, context_fn=_keep_products)
    for got, expected in zip(torch.autograd.grad(again.square().sum(), leaves), want, strict=True):
        assert torch.equal(got, expected)
