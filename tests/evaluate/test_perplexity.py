"""Perplexity and unigram entropy against sums over documents read one by one."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import slotmamba
from slotmamba.batch import plan_source
from slotmamba.config import Recipe, load_recipe
from slotmamba.evaluate import run
from slotmamba.evaluate.perplexity import evaluate, unigram_entropy
from slotmamba.evaluate.pulse import Pulse
from slotmamba.models import build_model
from slotmamba_data import MQARSetting, MQARSpec, ShardFolder, ShardWriter, Source, Tokenizer


def write(folder: Path, documents: list[list[int]]) -> Source:
    with ShardWriter(folder, vocab_size=10) as writer:
        for document in documents:
            writer.add(np.array(document))
    return Source("text", shards=folder)


def test_unigram_entropy_counts_labels(tmp_path: Path) -> None:
    # The labels are 3 3 4 and 3 5; the token that starts a document and the document of one token are none.
    source = write(tmp_path / "shards", [[1, 3, 3, 4], [9, 3, 5], [7]])
    expected = -(3 / 5 * math.log2(3 / 5) + 2 * (1 / 5) * math.log2(1 / 5))
    assert unigram_entropy(source) == pytest.approx(expected, abs=1e-12)


def test_unigram_entropy_of_uniform_and_constant_text(tmp_path: Path) -> None:
    assert unigram_entropy(write(tmp_path / "a", [[0, *range(8)]])) == pytest.approx(3, abs=1e-12)
    assert unigram_entropy(write(tmp_path / "b", [[0, 4, 4, 4]])) == 0


def test_unigram_entropy_is_of_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'recall' is not text"):
        unigram_entropy(Source("recall", "mqar", mqar=MQARSpec((MQARSetting(64, 4),))))
    with pytest.raises(ValueError, match="no document of two tokens"):
        unigram_entropy(write(tmp_path / "shards", [[1], [2]]))


@pytest.mark.slow
def test_perplexity_of_every_document(text_run: Path) -> None:
    """The run's rows of 32 tokens cut documents; with rows as long as all the text, documents can be run one by one."""
    recipe = load_recipe(text_run / "recipe.yaml")
    folder = ShardFolder(str(recipe.data.validation[0].shards))
    length = folder.manifest.tokens
    data = recipe.data.model_copy(update={"seq_len": length})
    model = slotmamba.load(text_run)
    (found,) = evaluate(model, recipe.model_copy(update={"data": data}), torch.device("cpu"), Pulse()).sources

    nats, labels, text = 0.0, Counter[int](), b""
    tokenizer = Tokenizer(str(recipe.data.tokenizer))
    for document in range(folder.manifest.documents):
        tokens = torch.from_numpy(folder.tokens(document).astype(np.int64))
        with torch.no_grad():
            nats += float(F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="sum"))
        labels.update(tokens[1:].tolist())
        text += tokenizer.decode(tokens.tolist()).encode()
    assert found.tokens == labels.total() == length - folder.manifest.documents
    assert found.bytes == len(text)
    # Sums of float32 losses in another order.
    assert found.loss == pytest.approx(nats / found.tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss), rel=1e-12)
    assert found.bits_per_token == pytest.approx(found.loss / math.log(2), rel=1e-12)
    assert found.bits_per_byte == pytest.approx(found.bits_per_token * found.tokens / len(text), rel=1e-12)
    shares = [count / labels.total() for count in labels.values()]
    assert found.unigram_bits_per_token == pytest.approx(-sum(share * math.log2(share) for share in shares), rel=1e-12)
    assert unigram_entropy(plan_source(recipe.data.validation[0])) == found.unigram_bits_per_token


def test_the_suite_on_a_run(text_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(text_run / "checkpoints" / "step-00000001", "perplexity") == 0
    printed = capsys.readouterr().out
    results = json.loads((text_run / "evaluation" / "perplexity.json").read_text())
    (source,) = results["sources"]
    assert results["checkpoint"] == "step-00000001" and source["source"] == "text"
    # Fresh weights know nothing: the loss is that of a uniform guess.
    assert source["bits_per_token"] == pytest.approx(math.log2(640), abs=0.1)
    assert f"{source['bits_per_byte']:.4f}" in printed and f"{source['unigram_bits_per_token']:.4f}" in printed


def variant(text_run: Path, changes: dict[str, Any]) -> Recipe:
    content = load_recipe(text_run / "recipe.yaml").model_dump(mode="json")
    for key, value in changes.items():
        content[key] = content[key] | value
    return Recipe.model_validate(content)


def test_without_tokenizer_there_are_no_bytes(text_run: Path) -> None:
    recipe = variant(text_run, {"data": {"tokenizer": None}})
    report = evaluate(slotmamba.load(text_run), recipe, torch.device("cpu"), Pulse())
    assert report.sources[0].bytes is None and report.sources[0].bits_per_byte is None
    assert "bits/byte needs data.tokenizer" in report.text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"validation": []}}, "text has no validation text"),
        ({"model": {"vocab_size": 500}}, "model.vocab_size=500, but the data have tokens up to 599"),
        ({"data": {"tokenizer": "gone.model"}}, r"gone\.model"),
    ],
)
def test_runs_that_do_not_fit(text_run: Path, changes: dict[str, Any], message: str) -> None:
    recipe = variant(text_run, changes)
    with pytest.raises(ValueError, match=message):
        evaluate(build_model(recipe.model), recipe, torch.device("cpu"), Pulse())


def test_an_unknown_suite(text_run: Path) -> None:
    with pytest.raises(ValueError, match="suite 'harness' is not known: expected one of recall, perplexity"):
        run(text_run, "harness")
