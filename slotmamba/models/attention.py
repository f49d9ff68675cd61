"""Softmax attention with rotary positions, causal or full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class KVCache:
    """Keys, rotated to their positions, and values of the tokens so far (or of a chunk of the sequence): [B, H, T, d]
    each."""

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        """Tokens T. Of all tokens so far it is the position of the next one."""
        return self.keys.shape[2]


class Attention(nn.Module):
    """Multi-head attention: rotary positions (RoPE, arXiv:2104.09864), torch's scaled_dot_product_attention.

    Positions are counted along the row, also in rows of several documents and in padded rows: a score depends on the
    distance of two tokens only, and tokens attend within their document. Matrices start as nn.Linear's.

    Args:
        d_model: channels C of x and y.
        n_heads: heads H; each has d = C/H channels, an even number, which the rotation takes in pairs.
        causal: whether a token attends to itself and the tokens before it only, or to all.
    """

    def __init__(self, d_model: int, n_heads: int, causal: bool) -> None:
        super().__init__()
        if d_model % (2 * n_heads):
            raise ValueError(
                f"Attention: d_model={d_model} is not an even number of channels for each of {n_heads} heads"
            )
        self.n_heads, self.head_dim, self.causal = n_heads, d_model // n_heads, causal
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, doc_start: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """x [B, T, C] -> y [B, T, C].

        doc_start: [B, T] index in the row of the first token of each token's document, with causal attention only;
        None is one document. valid: [B, T], False for padding, which no other token attends to (y there is finite and
        means nothing).
        """
        return self.extend(x, [], doc_start, valid)[0]

    def extend(
        self, x: Tensor, before: Sequence[KVCache], doc_start: Tensor | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, KVCache]:
        """The next chunk of a row: x [B, T, C] -> y [B, T, C] and the chunk's own keys and values.

        before: keys and values of the chunks so far, S tokens in all. doc_start: [B, T] as in `forward`, counted from
        the row's first token; valid: [B, S + T].
        """
        assert self.causal or (doc_start is None and not before)
        start, length = sum(chunk.length for chunk in before), x.shape[1]
        q, k, v = self._qkv(x, torch.arange(start, start + length, device=x.device))
        mask = self._mask(start, x, doc_start, valid)
        keys = torch.cat([*(chunk.keys for chunk in before), k], 2) if before else k
        values = torch.cat([*(chunk.values for chunk in before), v], 2) if before else v
        o = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=self.causal and mask is None)
        return self.out_proj(o.transpose(1, 2).flatten(2)), KVCache(k, v)

    def step(self, x: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """The next token of every row, causal attention: x [B, C] -> y [B, C] and a new cache that holds it too.

        The given cache stays as it is, so that decoding can go on from it twice. Copying it costs about what reading it
        for the scores does.
        """
        assert self.causal
        q, k, v = self._qkv(x.unsqueeze(1), torch.full((1,), cache.length, device=x.device))
        cache = KVCache(torch.cat([cache.keys.to(k.dtype), k], 2), torch.cat([cache.values.to(v.dtype), v], 2))
        o = F.scaled_dot_product_attention(q, cache.keys, cache.values)
        return self.out_proj(o.flatten(1)), cache

    def init_cache(self, batch: int) -> KVCache:
        """The cache before the first token."""
        empty = self.qkv_proj.weight.new_empty(batch, self.n_heads, 0, self.head_dim)
        return KVCache(empty, empty)

    def _qkv(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, C] at positions [T] -> rotated q and k, and v: [B, H, T, d] each."""
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.n_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return _rotate(q, positions), _rotate(k, positions), v

    def _mask(self, start: int, x: Tensor, doc_start: Tensor | None, valid: Tensor | None) -> Tensor | None:
        """Which of the tokens x, the first of them at `start` (row of the mask), may attend to which so far:
        [B, 1, T, start + T]; None: to all, or all up to itself."""
        if doc_start is not None and not bool((doc_start > 0).any()):
            doc_start = None
        if valid is not None and bool(valid.all()):
            valid = None
        if doc_start is None and valid is None and not start:
            return None
        batch, length, _ = x.shape
        index = torch.arange(start + length, device=x.device)
        place = index[start:, None]
        mask = torch.ones(batch, length, start + length, dtype=torch.bool, device=x.device)
        if self.causal:
            mask &= index <= place
        if doc_start is not None:
            mask &= index >= doc_start[:, :, None]
        if valid is not None:
            # Padding attends to itself: a softmax over nothing would be NaN.
            mask &= valid[:, None, :] | (index == place)
        return mask.unsqueeze(1)


def _rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Turns channels i and i + d/2 of x [B, H, T, d] by the angle position * base^(-2i/d), in float32 or wider."""
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    rate = ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = positions[:, None] * rate
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)
