"""A small valid recipe to start from."""

from __future__ import annotations

from pathlib import Path

import pytest

BASE = """\
name: base
model: {d_model: 64, vocab_size: 128}
data:
  seq_len: 64
  sources:
    - {name: text, shards: data/text}
    - {name: code, shards: data/code, weight: 0.5}
optim: {lr: 1e-3, warmup: 2}
train: {steps: 10, global_batch_tokens: 512}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a valid recipe in base.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path
