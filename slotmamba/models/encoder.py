"""The encoder: layers of bidirectional Mamba-2 or full attention, and SwiGLU, each pre-normed and residual."""

from __future__ import annotations

from torch import Tensor, nn

from slotmamba.config.schema import Checkpointing, ModelConfig
from slotmamba.models.attention import Attention
from slotmamba.models.layers import SwiGLU
from slotmamba.models.mamba2 import BiMamba2
from slotmamba.models.recompute import run_layer


class EncoderLayer(nn.Module):
    """x = x + Mixer(norm x); x = x + SwiGLU(norm x) when mlp_ratio > 0. The mixer sees the whole row."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.d_model)
        self.mixer: Attention | BiMamba2
        if layer in config.encoder_attn_layers:
            self.mixer = Attention(config.d_model, config.n_heads, causal=False)
        else:
            self.mixer = BiMamba2(config.d_model, config.ssm)
        self.mlp_norm = nn.RMSNorm(config.d_model) if config.mlp_ratio else None
        self.mlp = SwiGLU(config.d_model, round(config.mlp_ratio * config.d_model)) if config.mlp_ratio else None

    def forward(self, x: Tensor, valid: Tensor | None, checkpointing: Checkpointing) -> Tensor:
        return run_layer(checkpointing, self._layer, x, valid)

    def _layer(self, x: Tensor, valid: Tensor | None) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), valid=valid)
        if self.mlp is None or self.mlp_norm is None:
            return x
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nn.Module):
    """The stack of encoder layers and the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, layer) for layer in range(config.encoder_layers))
        self.norm = nn.RMSNorm(config.d_model)
        self.checkpointing: Checkpointing = "none"

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x [B, S, C] embeddings -> normed hidden states [B, S, C].

        valid: [B, S], False for padding, which changes nothing at the tokens (and where the output means nothing).
        """
        for layer in self.layers:
            x = layer(x, valid, self.checkpointing)
        return self.norm(x)
