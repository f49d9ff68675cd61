"""Mamba-2 against its equations token by token, and the bidirectional block with padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slotmamba.config.schema import SSMConfig
from slotmamba.models.mamba2 import BiMamba2, Mamba2

CONFIG = SSMConfig(state_size=6, head_dim=8, expand=2, conv_size=4, chunk_size=8)


def _token_by_token(mixer: Mamba2, x: Tensor) -> Tensor:
    """One row x [T, C]. The recurrence of Mamba-2 as its paper writes it, each token with its own window of taps."""
    width, size, heads = mixer.width, mixer.config.state_size, mixer.heads
    taps = mixer.conv1d.weight.squeeze(1)
    window = x.new_zeros(mixer.config.conv_size, width + 2 * size)
    h = x.new_zeros(heads, mixer.config.head_dim, size)
    outputs = []
    for x_t in x:
        z, xbc, dt = (mixer.in_proj.weight @ x_t).split([width, width + 2 * size, heads])
        window = torch.cat([window[1:], xbc.unsqueeze(0)])
        xbc = F.silu((window.T * taps).sum(1) + mixer.conv1d.bias)
        u, b, c = xbc.split([width, size, size])
        step = F.softplus(dt + mixer.dt_bias)
        y = []
        for head, u_h in enumerate(u.view(heads, -1)):
            decay = torch.exp(-step[head] * mixer.A_log[head].exp())
            h = h.clone()
            h[head] = decay * h[head] + step[head] * torch.outer(u_h, b)
            y.append(h[head] @ c + mixer.D[head] * u_h)
        gated = torch.cat(y) * F.silu(z)
        normed = gated / torch.sqrt(gated.square().mean() + 1e-5) * mixer.norm.weight
        outputs.append(mixer.out_proj.weight @ normed)
    return torch.stack(outputs)


def test_mixer_equals_its_equations() -> None:
    torch.manual_seed(0)
    mixer = Mamba2(12, CONFIG).double()
    x = torch.randn(2, 19, 12, dtype=torch.float64)
    y = mixer(x)
    for row in range(2):
        torch.testing.assert_close(y[row], _token_by_token(mixer, x[row]), rtol=0, atol=1e-12)


def test_mixer_is_causal() -> None:
    torch.manual_seed(0)
    mixer = Mamba2(12, CONFIG)
    x = torch.randn(2, 30, 12)
    before = mixer(x)
    x[:, 17:] += 1
    after = mixer(x)
    assert torch.equal(before[:, :17], after[:, :17])
    assert not torch.equal(before[:, 17:], after[:, 17:])


def test_parameters_are_those_of_mamba_ssm() -> None:
    """Shapes of mamba_ssm.modules.mamba2.Mamba2(d_model=12, d_state=6, headdim=8): names matter to imported weights."""
    shapes = {name: tuple(tensor.shape) for name, tensor in Mamba2(12, CONFIG).state_dict().items()}
    assert shapes == {
        "in_proj.weight": (24 + 24 + 6 + 6 + 3, 12),
        "conv1d.weight": (36, 1, 4),
        "conv1d.bias": (36,),
        "dt_bias": (3,),
        "A_log": (3,),
        "D": (3,),
        "norm.weight": (24,),
        "out_proj.weight": (12, 24),
    }


def test_starting_step_sizes_and_decays() -> None:
    torch.manual_seed(0)
    mixer = Mamba2(256, SSMConfig(head_dim=1))
    step, rate = F.softplus(mixer.dt_bias.detach().double()), mixer.A_log.detach().exp()
    assert 0.99e-3 < step.min() < 2e-3 and 0.05 < step.max() < 0.101
    # Log-uniform: half of the 512 heads on either side of the geometric mean, give or take four standard deviations.
    assert abs((step < 1e-2).double().mean() - 0.5) < 4 * 0.5 / 512**0.5
    assert 0.999 < rate.min() < 2 and 15 < rate.max() < 16.01
    assert torch.equal(mixer.D.detach(), torch.ones(512))


def test_bidirectional_block_is_a_sum_of_two_directions() -> None:
    torch.manual_seed(0)
    block = BiMamba2(12, CONFIG).double()
    x = torch.randn(1, 15, 12, dtype=torch.float64)
    backward = _token_by_token(block.backward_mixer, x[0].flip(0)).flip(0)
    expected = _token_by_token(block.forward_mixer, x[0]) + backward
    torch.testing.assert_close(block(x)[0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(block(x, torch.ones(1, 15, dtype=torch.bool))[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", [[13, 14, 15, 16], [0, 1], [0, 4, 5, 9, 16]], ids=["end", "start", "everywhere"])
def test_padding_changes_nothing(padding: list[int]) -> None:
    torch.manual_seed(0)
    block = BiMamba2(12, CONFIG)
    x = torch.randn(2, 17, 12, requires_grad=True)
    valid = torch.ones(2, 17, dtype=torch.bool)
    valid[0, padding] = False
    y = block(x, valid)
    for row in range(2):
        alone = block(x[row : row + 1, valid[row]])[0]
        torch.testing.assert_close(y[row, valid[row]], alone, rtol=0, atol=1e-5)
    y[valid].square().sum().backward()
    assert x.grad is not None
    assert bool((x.grad[~valid] == 0).all()) and bool((x.grad[valid].abs().amax(-1) > 0).all())


def test_bfloat16_autocast_is_close() -> None:
    torch.manual_seed(0)
    block = BiMamba2(12, CONFIG)
    x = torch.randn(2, 17, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.bfloat16
    # Three products in bfloat16 (8 bits), and a norm that scales small numbers up to 1.
    torch.testing.assert_close(y.float(), block(x), rtol=0, atol=5e-2)


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    block = BiMamba2(12, CONFIG)
    block(torch.randn(2, 9, 12)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_heads_must_fill_the_width() -> None:
    with pytest.raises(ValueError, match="expand\\*d_model=24 is not divisible by head_dim=7"):
        Mamba2(12, SSMConfig(head_dim=7))
