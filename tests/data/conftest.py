"""A small tokenizer and small folders of shards, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from slotmamba_data import ShardWriter, Tokenizer, build_text, train_tokenizer

# A busy machine is no bug, and the tests leave nothing in the source tree.
settings.register_profile("suite", deadline=None, database=None, print_blob=True)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["austen:val"], folder, vocab_size=700)
    return Tokenizer(folder)


@pytest.fixture(scope="session")
def text_shards(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Northanger Abbey in documents of about 2 KiB and several shards."""
    folder = tmp_path_factory.mktemp("text") / "shards"
    build_text(["austen:val"], tokenizer, folder, document_bytes=2048, shard_bytes=50_000)
    return folder


MakeShards = Callable[..., list[np.ndarray]]


@pytest.fixture(scope="session")
def make_shards() -> MakeShards:
    def make(folder: Path, lengths: list[int], seed: int = 0, vocab_size: int = 1000) -> list[np.ndarray]:
        """Write documents of random tokens; returns them."""
        rng = np.random.default_rng(seed)
        documents = [rng.integers(3, vocab_size, length) for length in lengths]
        with ShardWriter(folder, vocab_size=vocab_size, shard_bytes=7000) as writer:
            for document in documents:
                writer.add(document)
        return documents

    return make
