"""Tiny recipes to estimate."""

from __future__ import annotations

from typing import Any

from slotmamba.config import Recipe

SLOTS: dict[str, Any] = {"factors": 2, "factor_size": 3, "top_k": 2, "address_conv": 3, "segment_len": 4}
TINY: dict[str, Any] = {
    "vocab_size": 16,
    "d_model": 8,
    "n_heads": 2,
    "decoder_layers": 2,
    "decoder_attn_layer": 1,
    "mlp_ratio": 2.0,
    "bdlru": {"block_size": 2},
    "slots": SLOTS | {"householder_steps": 2},
}
ENCODER: dict[str, Any] = {
    "encoder_layers": 2,
    "encoder_attn_layers": [1],
    "decoder_inject_layers": [1],
    "ssm": {"state_size": 4, "head_dim": 4, "chunk_size": 5},
}
RECALL = {"form": "seq2seq", "vocab_size": 64, "settings": [{"length": 9, "pairs": 8}, {"length": 5, "pairs": 9}]}
WIDE: dict[str, Any] = {"vocab_size": 512, "d_model": 64, "decoder_attn_layer": 1, "mlp_ratio": 2.0}


def recipe_of(model: dict[str, Any], seq_len: int = 12, rows: int = 4, **sections: Any) -> Recipe:
    """Text from shards that are not there, or recall for an encoder-decoder."""
    text = {"name": "text", "kind": "lm", "shards": "nowhere"}
    recall = {"name": "recall", "kind": "mqar", "mqar": RECALL}
    content = {
        "name": "tiny",
        "model": model,
        "data": {"seq_len": seq_len, "sources": [recall if "encoder_layers" in model else text]},
        "train": {"steps": 10, "global_batch_tokens": seq_len * rows, "micro_batch": rows, "device": "cpu"},
    }
    return Recipe.model_validate(content | sections)
