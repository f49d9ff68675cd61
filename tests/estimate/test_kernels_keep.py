"""What the Triton kernels keep: the model runs on tensors without values, which the kernels' ops describe."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function

from slotmamba.config import Recipe, load_recipe
from slotmamba.device import compute_precision
from slotmamba.estimate import estimate
from slotmamba.estimate.row import row_shape
from slotmamba.models import build_model

pytest.importorskip("triton")


class _FusedNorm(Function):
    """Keeps what the fused kernel keeps: its input; tensors without values take the way of separate operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is Triton, no value is looked at, and norms are fused."""
    monkeypatch.setattr("slotmamba_kernels.backends._checked", lambda x: True)
    # The package's attribute `hksa` is the function.
    monkeypatch.setattr(sys.modules["slotmamba_kernels.hksa.arguments"], "_has_values", lambda x: False)
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda self, x: _FusedNorm.apply(x, self.weight))


def kept_by_the_decoder(recipe: Recipe) -> int:
    """Bytes of one micro-batch, beside the parameters, the copies that autocast makes of them, and what tells
    documents and padding."""
    with torch.device("meta"):
        model = build_model(recipe.model)
    rows, length = recipe.train.micro_batch, recipe.data.seq_len
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode():
        weights = [parameter for module in model.modules() for parameter in _filled(module)]
        x, doc_start = torch.empty(rows, length, recipe.model.d_model), torch.zeros(rows, length, dtype=torch.long)
        valid = torch.ones(rows, length, dtype=torch.bool) if row_shape(recipe).padded else None
        with (
            compute_precision(torch.device("cpu"), recipe.train.precision),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            model.decoder(x, doc_start=doc_start, valid=valid)
    # A matrix is kept as itself or transposed, its copy in another precision too.
    shapes = {shape for weight in weights for shape in (weight.shape, weight.shape[::-1])}
    numbers = [tensor for tensor in kept.values() if tensor.shape not in shapes and tensor.dtype != torch.bool]
    return sum(tensor.untyped_storage().nbytes() for tensor in numbers)


def _filled(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of the module itself, replaced by such as the mode makes: moving them there fails for tied ones."""
    for name, parameter in module.named_parameters(recurse=False):
        module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape)))
    return list(module.parameters(recurse=False))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.precision=fp32"],
        ["model.slots.thread_layers=false", "model.slots.householder_steps=1", "model.slots.address_conv=1"],
        ["model.bdlru.block_size=8", "model.slots.segment_len=300", "model.mlp_ratio=0"],
        ["model.bdlru.block_size=32", "model.n_heads=4", "model.slots.top_k=4"],
    ],
    ids=["lm-340m", "fp32", "not threaded", "other sizes", "blocks that BD-LRU has no kernel for"],
)
def test_what_kernels_keep_within_1_percent(monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> None:
    as_on_a_gpu(monkeypatch)
    recipe = load_recipe("lm-340m", ["model.decoder_layers=3", "model.decoder_attn_layer=null", *overrides])
    memory = estimate(recipe).memory
    beside = ("output", "backward workspace")
    expected = sum(number for part, number in memory.activations.items() if part not in beside)
    final_norm = 4 * recipe.model.d_model * recipe.data.seq_len * recipe.train.micro_batch
    found = kept_by_the_decoder(recipe)
    print(f"{found:,} bytes kept")
    assert expected + memory.boundary_states + final_norm == pytest.approx(found, rel=0.01)
