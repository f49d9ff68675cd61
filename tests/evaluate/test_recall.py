"""The recall suite: against logits read one by one, and against a model that knows which answers it gets right."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slotmamba.config import Recipe
from slotmamba.device import choose_device
from slotmamba.evaluate import recall, run
from slotmamba.evaluate.pulse import Pulse
from slotmamba.models import build_model
from slotmamba.models.slotmamba import IGNORED, TokenLosses
from slotmamba.train import train
from slotmamba_data import PUBLISHED_TEST, MQARSetting, MQARSpec, build_mqar, generate_mqar

CPU = torch.device("cpu")


def recipe_of(folder: Path, mqar: dict[str, Any] | None = None, **model: Any) -> Recipe:
    """Vocabulary 64 has 16 keys, enough for three of the seven settings."""
    mqar = {"settings": [{"length": 32, "pairs": 4}, {"length": 128, "pairs": 8}], "vocab_size": 64} | (mqar or {})
    slots = {"factors": 2, "factor_size": 4, "top_k": 2, "segment_len": 64}
    return Recipe.model_validate(
        {
            "name": "recall",
            "run_dir": str(folder / "run"),
            "model": {"vocab_size": 64, "d_model": 16, "n_heads": 1, "decoder_layers": 1, "slots": slots} | model,
            "data": {"seq_len": 128, "sources": [{"name": "recall", "kind": "mqar", "mqar": mqar}]},
            "train": {"steps": 2, "global_batch_tokens": 4096, "micro_batch": 32},
        }
    )


class Knows(torch.nn.Module):
    """Right exactly where the value is fewer than `reach` tokens before the query."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach = reach

    def losses(self, input_ids: Tensor, labels: Tensor) -> TokenLosses:
        row, position = (labels != IGNORED).nonzero(as_tuple=True)
        right = []
        for b, t in zip(row.tolist(), position.tolist(), strict=True):
            # values are nowhere but with their keys, fillers being outside; the last place counts
            stored = max((input_ids[b, :t] == labels[b, t]).nonzero().flatten().tolist())
            right.append(t - stored < self.reach)
        zeros = torch.zeros(len(right))
        return TokenLosses(zeros, zeros, torch.tensor(right), row, position, zeros.sum())


def test_gaps_belong_to_their_queries(tmp_path: Path) -> None:
    report = recall.evaluate(Knows(reach=16), recipe_of(tmp_path), CPU, Pulse(), samples=40)
    assert [(each.length, each.pairs) for each in report.settings] == [(64, 4), (64, 8), (64, 16)]
    for setting in report.settings:
        assert sum(gap.answers for gap in setting.gaps) == 40 * setting.pairs
        assert {gap.recall for gap in setting.gaps if gap.past <= 16} == {1.0}
        assert {gap.recall for gap in setting.gaps if gap.first >= 16} == {0.0}
        right = sum(gap.answers for gap in setting.gaps if gap.past <= 16)
        assert setting.recall == pytest.approx(right / (40 * setting.pairs), abs=1e-12)
    assert report.mean == pytest.approx(np.mean([setting.recall for setting in report.settings]))
    assert [(each.length, each.pairs) for each in report.left_out] == [(128, 32), (256, 64), (512, 128), (1024, 256)]
    assert [setting.trained for setting in report.settings] == [True, True, False]


def test_recall_is_the_share_of_queries_whose_likeliest_token_is_the_value(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tie_embeddings=False)  # tied weights would mostly repeat the query
    torch.manual_seed(0)
    model = build_model(recipe.model).eval()
    torch.nn.init.normal_(model.output.weight)
    report = recall.evaluate(model, recipe, CPU, Pulse(), samples=50)
    spec = MQARSpec((MQARSetting(64, 16),), vocab_size=64)
    samples = generate_mqar(spec, spec.settings[0], np.arange(50), seed=0, stream="evaluation")
    with torch.no_grad():
        likeliest = model(torch.from_numpy(samples.tokens)).argmax(-1).numpy()
    right = sum(
        likeliest[b, t] == samples.labels[b, t] for b in range(50) for t in range(64) if samples.labels[b, t] != IGNORED
    )
    assert report.settings[2].recall == pytest.approx(right / (50 * 16), abs=1e-12)
    assert right > 0


def test_rewritten_keys_and_several_passes_are_measured_too(tmp_path: Path) -> None:
    special = [{"length": 64, "pairs": 4, "updates": 3}, {"length": 64, "pairs": 4, "passes": 3}]
    recipe = recipe_of(tmp_path, {"settings": [{"length": 32, "pairs": 4}, *special]})
    report = recall.evaluate(Knows(reach=16), recipe, CPU, Pulse(), samples=40)
    assert [(each.updates, each.passes, each.published) for each in report.settings[-2:]] == [
        (3, 1, False),
        (0, 3, False),
    ]
    for setting in report.settings:
        assert {gap.recall for gap in setting.gaps if gap.past <= 16} <= {1.0}
        assert {gap.recall for gap in setting.gaps if gap.first >= 16} <= {0.0}
    assert report.mean == pytest.approx(np.mean([setting.recall for setting in report.settings[:-2]]))
    assert "64 tokens, 4 pairs, 3 written again" in report.text() and "64 tokens, 4 pairs, 3 passes" in report.text()
    assert "mean of 3 published settings" in report.text()
    assert sum(gap.answers for gap in report.gaps) == 40 * (4 + 8 + 16 + 4 + 4)
    assert {gap.recall for gap in report.gaps if gap.past <= 16} == {1.0}


def test_an_encoder_decoder(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"form": "seq2seq"}, encoder_layers=1, decoder_inject_layers=[0])
    report = recall.evaluate(build_model(recipe.model).eval(), recipe, CPU, Pulse(), samples=4)
    assert report.spec.form == "seq2seq"
    assert [sum(gap.answers for gap in setting.gaps) for setting in report.settings] == [16, 32, 64]


def test_stored_samples_say_what_they_are(tmp_path: Path) -> None:
    spec = MQARSpec((MQARSetting(64, 4),), vocab_size=80, fillers="any")
    build_mqar(spec, [3], tmp_path / "shards")
    recipe = recipe_of(tmp_path)
    stored = {"name": "stored", "kind": "mqar", "shards": str(tmp_path / "shards")}
    content = recipe.model_dump(mode="json")
    content["data"]["sources"] = [stored]
    content["model"]["vocab_size"] = 80
    recipe = Recipe.model_validate(content)
    report = recall.evaluate(build_model(recipe.model).eval(), recipe, CPU, Pulse(), samples=2)
    assert (report.spec.vocab_size, report.spec.fillers) == (80, "any")
    assert [(each.length, each.pairs) for each in report.settings] == [(64, 4), (64, 8), (64, 16), (128, 32)]


def test_a_run_without_recall_data_needs_the_published_vocabulary(text_run: Path) -> None:
    with pytest.raises(ValueError, match=r"vocabulary of 8192 tokens, the model of text has 640: .* kind mqar"):
        run(text_run, "recall")


def test_too_few_keys_for_any_setting(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"vocab_size": 36, "settings": [{"length": 8, "pairs": 2}]})
    with pytest.raises(ValueError, match="have 2 keys, fewer than any"):
        recall.evaluate(build_model(recipe.model), recipe, CPU, Pulse())


def test_it_says_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each setting, and one in between whenever the last is ten seconds old; here time passes by calls."""
    seconds = itertools.count(step=4.0)
    recipe = recipe_of(tmp_path)
    recall.evaluate(Knows(reach=1000), recipe, CPU, Pulse(clock=lambda: next(seconds)), samples=200)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "recall" in line] == [f"64 tokens, {n} pairs: recall 1.000" for n in (4, 8, 16)]
    assert "64 tokens, 4 pairs: 128 of 200 samples" in lines


@pytest.mark.slow
def test_the_suite_on_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path)
    assert train(recipe) == 0
    capsys.readouterr()
    assert run(tmp_path / "run", "recall") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"recall, step-00000002: recall on {choose_device('auto', 'device')}\n64 tokens, 4 pairs: recall "
    )
    assert "64 tokens, 16 pairs *" in printed and "the published one" in printed
    results = json.loads((tmp_path / "run" / "evaluation" / "recall.json").read_text())
    assert results["checkpoint"] == "step-00000002" and results["samples_per_setting"] == 1000
    assert [setting["pairs"] for setting in results["settings"]] == [4, 8, 16]
    assert results["mean"] == np.mean([setting["recall"] for setting in results["settings"]])
    assert f"mean of 3 settings: {results['mean']:.3f}" in printed
    assert len(results["settings"]) + len(results["left_out"]) == len(PUBLISHED_TEST)
    image = (tmp_path / "run" / "evaluation" / "recall.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 10_000


def test_fewer_samples(tmp_path: Path) -> None:
    assert train(recipe_of(tmp_path)) == 0
    assert run(tmp_path / "run", "recall", samples=2) == 0
    results = json.loads((tmp_path / "run" / "evaluation" / "recall.json").read_text())
    assert results["samples_per_setting"] == 2
    for suite, samples in (("recall", 0), ("perplexity", 2)):
        with pytest.raises(ValueError, match=f"samples={samples}: expected at least 1, and with the suite recall only"):
            run(tmp_path / "run", suite, samples)
