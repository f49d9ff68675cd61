from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from slotmamba.config.schema import OptimConfig
from slotmamba.optim import build_optimizer, gradient_norm, scale_gradients

OPTIM = OptimConfig(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.gate = nn.Parameter(torch.randn(4, 4))
        self.gate.no_weight_decay = True  # type: ignore[attr-defined]
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.linear(self.embedding(tokens)) @ self.gate) * self.temperature)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def loss_of(model: Model) -> torch.Tensor:
    return (model(torch.arange(6)) - torch.eye(6)).square().mean()


def test_groups(model: Model) -> None:
    optimizer = build_optimizer(model, OPTIM)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["name"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert groups == {
        "decay": {"embedding.weight", "linear.weight"},
        "no_decay": {"linear.bias", "norm.weight", "norm.bias", "gate", "temperature"},
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 7
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {"decay": 0.3, "no_decay": 0}
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.8, 0.9), 1e-6)


def test_an_empty_group_is_left_out() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2, bias=False), OPTIM)
    assert [group["name"] for group in optimizer.param_groups] == ["decay"]


def test_steps_are_those_of_adamw_as_published(model: Model) -> None:
    """Against the update written out in float64; fp32 arithmetic agrees to 1e-6."""
    optimizer = build_optimizer(model, OPTIM)
    exact = copy.deepcopy(model).double()
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in exact.named_parameters()}
    for step in range(1, 4):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        exact.zero_grad()
        loss_of(exact).backward()
        with torch.no_grad():
            for name, parameter in exact.named_parameters():
                if parameter.grad is None:
                    continue
                first, second = moments[name]
                first.mul_(0.8).add_(0.2 * parameter.grad)
                second.mul_(0.9).add_(0.1 * parameter.grad**2)
                decay = 0.3 if name in ("embedding.weight", "linear.weight") else 0.0
                update = (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-6)
                parameter.sub_(0.01 * (update + decay * parameter))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), exact.get_parameter(name), rtol=0, atol=1e-6)


def test_gradient_norm_and_scaling(model: Model) -> None:
    loss_of(model).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    expected = math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in gradients))
    norm = gradient_norm(model.parameters())
    assert norm.item() == pytest.approx(expected, rel=1e-6)

    scale_gradients(model.parameters(), norm, 0.0)
    scale_gradients(model.parameters(), norm, 2 * expected)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(gradients, after, strict=True)), "0 and a large norm change nothing"

    scale_gradients(model.parameters(), norm, 0.1 * expected)
    for a, b in zip(gradients, after, strict=True):
        torch.testing.assert_close(b, 0.1 * a, rtol=1e-4, atol=0)  # torch adds 1e-6 to the norm


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_gradient_shows_in_the_norm(model: Model, bad: float) -> None:
    loss_of(model).backward()
    assert model.norm.bias.grad is not None
    model.norm.bias.grad[1] = bad
    assert not gradient_norm(model.parameters()).isfinite()


def test_no_gradients(model: Model) -> None:
    norm = gradient_norm(model.parameters())
    assert norm.item() == 0
    scale_gradients(model.parameters(), norm, 1.0)
