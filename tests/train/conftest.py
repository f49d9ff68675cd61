"""Data and processes for the tests of the training loop, made once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from slotmamba_data import Tokenizer, build_text, open_text, train_tokenizer
from tests.train.runs import Commands, Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A few pages of Jane Austen, their tokenizer and their shards."""
    folder = tmp_path_factory.mktemp("data")
    pages = [text for _, text in zip(range(9), open_text("austen:val", document_bytes=2048), strict=False)]
    (folder / "train.txt").write_text("".join(pages[:1]))
    (folder / "val.txt").write_text("".join(pages[1:2]))
    (folder / "all.txt").write_text("".join(pages))
    train_tokenizer([folder / "all.txt"], folder / "tokenizer", vocab_size=380)
    for split in ("train", "val"):
        build_text([folder / f"{split}.txt"], Tokenizer(folder / "tokenizer"), folder / split, document_bytes=300)
    return Runs(folder)


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a second would spend most of it on their plots, which have tests of their own."""
    monkeypatch.setattr("slotmamba.train.plot_run", lambda run_dir: [])
