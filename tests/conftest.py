"""Runs as `slotmamba train` leaves them, made once: a recipe, a checkpoint and what they refer to.

The fixtures import what they need themselves: the tests of the kernels run where nothing but torch and triton is.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from slotmamba.config import Recipe

# What starts pytest in the background has it ignore Ctrl-C, and with it all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before any kernel is imported: Triton decides then whether it interprets or compiles.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TEXT_RECIPE = """\
name: text
run_dir: {folder}/run
model:
  vocab_size: 640
  d_model: 32
  n_heads: 2
  decoder_layers: 2
  slots: {{factors: 2, factor_size: 4, top_k: 4, segment_len: 16}}
data:
  seq_len: 32
  tokenizer: {folder}/tokenizer
  sources: [{{name: text, shards: {folder}/shards}}]
  validation: [{{name: text, shards: {folder}/shards}}]
train: {{steps: 1, global_batch_tokens: 512, micro_batch: 16}}
"""

SaveRun = Callable[["Recipe"], Path]


@pytest.fixture(scope="session")
def save_run() -> SaveRun:
    from slotmamba.checkpoint import CheckpointStore, TensorContents
    from slotmamba.config import save_recipe
    from slotmamba.models import build_model
    from slotmamba.optim import build_optimizer

    def save(recipe: Recipe) -> Path:
        """A run folder with a checkpoint of fresh weights."""
        torch.manual_seed(recipe.seed)
        model = build_model(recipe.model)
        store = CheckpointStore(recipe.run_path, keep=1, model_config=recipe.model.model_dump(mode="json"))
        store.save(1, TensorContents(model, build_optimizer(model, recipe.optim)), {})
        save_recipe(recipe, recipe.run_path / "recipe.yaml")
        return recipe.run_path

    return save


@pytest.fixture(scope="session")
def text_run(save_run: SaveRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of fresh weights whose training and validation text are two documents of 1 KiB by Jane Austen."""
    from slotmamba.config import load_recipe
    from slotmamba_data import Tokenizer, build_text, open_text, train_tokenizer

    folder = tmp_path_factory.mktemp("text")
    train_tokenizer(["austen:val"], folder / "tokenizer", vocab_size=600)
    tokenizer = Tokenizer(folder / "tokenizer")
    documents = islice(open_text("austen:val", document_bytes=1024), 2)
    (folder / "text.txt").write_text("".join(documents), newline="")
    build_text([folder / "text.txt"], tokenizer, folder / "shards", document_bytes=1024)
    (folder / "text.yaml").write_text(TEXT_RECIPE.format(folder=folder))
    return save_run(load_recipe(folder / "text.yaml"))
