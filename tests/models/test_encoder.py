"""The encoder: which layers it has, both directions, padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slotmamba.config.schema import ModelConfig, SSMConfig
from slotmamba.models.attention import Attention
from slotmamba.models.encoder import Encoder
from slotmamba.models.layers import SwiGLU
from slotmamba.models.mamba2 import BiMamba2


def _config(**changes: Any) -> ModelConfig:
    ssm = SSMConfig(state_size=6, head_dim=8, chunk_size=8)
    keys = {
        "d_model": 16,
        "n_heads": 2,
        "encoder_layers": 3,
        "decoder_inject_layers": [0],
        "ssm": ssm,
        "mlp_ratio": 2.0,
    }
    return ModelConfig(**{**keys, **changes})


def _encoder(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(_config(**changes))


def test_layers_are_those_of_the_config() -> None:
    encoder = _encoder(encoder_attn_layers=[1])
    assert [type(layer.mixer) for layer in encoder.layers] == [BiMamba2, Attention, BiMamba2]
    assert not encoder.layers[1].mixer.causal
    assert all(isinstance(layer.mlp, SwiGLU) for layer in encoder.layers)
    assert all(layer.mlp is None and layer.mlp_norm is None for layer in _encoder(mlp_ratio=0.0).layers)


def test_swiglu_width_is_a_multiple_of_8() -> None:
    assert SwiGLU(16, 33).up_proj.weight.shape == (40, 16)
    assert SwiGLU(16, 32).up_proj.weight.shape == (32, 16)


@pytest.mark.parametrize("attention", [[], [1], [0, 1, 2]])
def test_padding_changes_nothing(attention: list[int]) -> None:
    encoder = _encoder(encoder_attn_layers=attention)
    x = torch.randn(3, 14, 16)
    lengths = [14, 9, 1]
    valid = torch.arange(14) < torch.tensor(lengths)[:, None]
    y = encoder(x, valid)
    assert y.isfinite().all()
    for row, length in enumerate(lengths):
        torch.testing.assert_close(y[row, :length], encoder(x[row : row + 1, :length])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", [[], [0, 1, 2]])
def test_every_token_reaches_every_token(attention: list[int]) -> None:
    encoder = _encoder(encoder_attn_layers=attention)
    x = torch.randn(1, 6, 16, requires_grad=True)
    y = encoder(x)
    for t in range(6):
        (gradient,) = torch.autograd.grad(y[0, t, 0], x, retain_graph=True)
        assert bool((gradient[0].abs().amax(-1) > 0).all())


def test_every_parameter_gets_a_gradient() -> None:
    encoder = _encoder(encoder_attn_layers=[1])
    encoder(torch.randn(2, 9, 16))[..., 0].square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
