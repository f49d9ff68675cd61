"""The training loop computes what the recipe says."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from slotmamba.batch import Batch, plan_source
from slotmamba.checkpoint import load_model
from slotmamba.config import Recipe
from slotmamba.device import compute_precision
from slotmamba.evaluate.validation import Validation
from slotmamba.models import build_model
from slotmamba.models.initial import InitialWeights
from slotmamba.schedule import learning_rate
from slotmamba.train import train
from slotmamba_data import MQARSetting, MQARSpec, build_mqar, open_plan
from tests.train.runs import Runs, assert_same_run, assert_same_tensors, records, tensors

pytestmark = [pytest.mark.usefixtures("without_plots"), pytest.mark.timeout(300)]

CPU = torch.device("cpu")
SEQ2SEQ = [
    "model.encoder_layers=1",
    "model.decoder_inject_layers=[1]",
    "model.ssm={state_size: 4, head_dim: 16, chunk_size: 8}",
    "data.sources=[{name: recall, kind: mqar, mqar: {form: seq2seq, vocab_size: 64, "
    "settings: [{length: 4, pairs: 3}, {length: 24, pairs: 12}]}}]",
    "data.validation=${data.sources}",
]


def trained(recipe: Recipe, kind: str = "train") -> list[dict[str, Any]]:
    """The records of a run."""
    assert train(recipe) == 0
    return records(recipe.run_path, kind)


def assert_close(left: list[dict[str, Any]], right: list[dict[str, Any]], tolerance: float) -> None:
    """Records with the same keys and, to a relative tolerance, the same numbers."""
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert value == (other[key] if isinstance(value, str) else pytest.approx(other[key], rel=tolerance)), key


def test_the_loss_is_the_mean_over_the_labelled_tokens_of_the_step(runs: Runs, tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, "train.steps=1", "optim.warmup=0", "seed=5")
    model = build_model(recipe.model)
    InitialWeights(model, recipe.seed).fill(model)
    plan = open_plan(list(map(plan_source, recipe.data.sources)), recipe.data.seq_len, recipe.seed)
    nats: dict[str, list[float]] = defaultdict(list)
    for number in range(recipe.rows_per_step):
        row = plan[number]
        batch = Batch.of([row], CPU)
        with torch.no_grad():
            logits = model(batch.input_ids, doc_start=batch.doc_start, valid=batch.valid)
        log_probabilities = logits[0].double().log_softmax(-1)
        nats[plan.sources[row.source].name] += [
            -float(log_probabilities[position, label]) for position, label in enumerate(row.labels) if label != -100
        ]
    assert nats.keys() == {"recall", "text"}
    assert len(nats["text"]) > 4 * len(nats["recall"]), "the rows should differ in their number of labels"

    (record,) = trained(recipe)
    every = [each for values in nats.values() for each in values]
    assert record["labelled_tokens"] == len(every)
    assert record["loss"] == pytest.approx(sum(every) / len(every), rel=1e-6)
    for name, values in nats.items():
        assert record[f"loss/{name}"] == pytest.approx(sum(values) / len(values), rel=1e-6)
    assert record["tokens"] == recipe.train.global_batch_tokens


@pytest.mark.timeout(300)
@pytest.mark.parametrize("overrides", [[], SEQ2SEQ], ids=["decoder-only", "encoder-decoder"])
def test_accumulation_changes_nothing(runs: Runs, tmp_path: Path, overrides: list[str]) -> None:
    settings = [*overrides, "train.steps=5", "train.global_batch_tokens=192", "optim.z_loss=0.01"]
    results = {
        size: trained(runs.recipe(tmp_path / str(size), *settings, f"train.micro_batch={size}")) for size in (2, 4, 8)
    }
    assert len(results[8]) == 5
    for size in (2, 4):
        assert_close(results[size], results[8], 1e-5)


def test_the_seed_decides_everything(runs: Runs, tmp_path: Path) -> None:
    settings = ["train.steps=6", "train.eval_every=3"]
    first = trained(runs.recipe(tmp_path / "first", *settings))
    trained(runs.recipe(tmp_path / "again", *settings))
    assert_same_run(tmp_path / "again", tmp_path / "first")
    other = trained(runs.recipe(tmp_path / "other", *settings, "seed=1"))
    assert all(a["loss"] != b["loss"] for a, b in zip(first, other, strict=True))


def test_validation_does_not_disturb_training(runs: Runs, tmp_path: Path) -> None:
    often = trained(runs.recipe(tmp_path / "often", "train.steps=6", "train.eval_every=1"))
    assert often == trained(runs.recipe(tmp_path / "once", "train.steps=6", "train.eval_every=1000"))
    assert_same_tensors(tensors(tmp_path / "often", 6), tensors(tmp_path / "once", 6))
    assert [record["step"] for record in records(tmp_path / "often", "validation")] == [
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
        5,
        5,
        6,
        6,
    ]
    assert [record["step"] for record in records(tmp_path / "once", "validation")] == [6, 6]


def test_validation_measures_the_same_rows_every_time(runs: Runs, tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, "train.steps=2", "train.eval_rows=7")
    logged = trained(recipe, "validation")
    model = load_model(tmp_path)
    assert not model.training

    def measure(recipe: Recipe) -> list[dict[str, Any]]:
        found = Validation(recipe).run(model, CPU, lambda: compute_precision(CPU, "fp32"))
        assert found is not None
        return [{"kind": "validation", "step": 2, **record} for record in found]

    assert measure(recipe) == measure(recipe) == logged
    assert_close(
        measure(runs.recipe(tmp_path, "train.steps=2", "train.eval_rows=7", "train.micro_batch=4")), logged, 1e-6
    )
    assert {key for record in logged for key in record if key.startswith("recall/")} == {"recall/8x2", "recall/24x4"}
    for record in logged:
        assert record["bits_per_token"] == pytest.approx(record["loss"] / math.log(2), rel=1e-12)


def test_bf16_computes_in_bfloat16_and_keeps_its_state_in_float32(runs: Runs, tmp_path: Path) -> None:
    settings = ["train.steps=4", "data.sources.0.weight=3"]
    fine = trained(runs.recipe(tmp_path / "fp32", *settings))
    coarse = trained(runs.recipe(tmp_path / "bf16", *settings, "train.precision=bf16"))
    for one, other in zip(coarse, fine, strict=True):
        assert one["loss"] != other["loss"]
        assert one["loss"] == pytest.approx(other["loss"], rel=0.01)
        assert math.isfinite(one["grad_norm"])
    stored = tensors(tmp_path / "bf16", 4)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert any(name.endswith("exp_avg_sq") for name in stored)
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())


def test_z_loss_draws_the_log_partition_to_zero(runs: Runs, tmp_path: Path) -> None:
    plain = trained(runs.recipe(tmp_path / "plain", "optim.lr=0.02"))
    drawn = trained(runs.recipe(tmp_path / "drawn", "optim.lr=0.02", "optim.z_loss=1"))
    assert drawn[0]["loss"] == plain[0]["loss"], "the loss reported is the cross-entropy alone"
    assert drawn[0]["grad_norm"] != plain[0]["grad_norm"]
    plan = open_plan([plan_source(runs.recipe(tmp_path).data.validation[1])], 24, 0)
    batch = Batch.of([plan[number] for number in range(8)], CPU)
    with torch.no_grad():
        z = {name: load_model(tmp_path / name).losses(**batch.arguments()).z.mean() for name in ("plain", "drawn")}
    assert z["drawn"] < 0.95 * z["plain"]


def test_balance_spreads_the_addresses(runs: Runs, tmp_path: Path) -> None:
    without = trained(runs.recipe(tmp_path / "without", "model.slots.balance=0", "optim.lr=0.01"))
    spread = trained(runs.recipe(tmp_path / "with", "model.slots.balance=5", "optim.lr=0.01"))
    assert spread[0]["balance"] == without[0]["balance"]
    assert spread[-1]["balance"] < 0.5 * without[-1]["balance"]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear"])
def test_schedules(runs: Runs, tmp_path: Path, schedule: str) -> None:
    recipe = runs.recipe(tmp_path, f"optim.schedule={schedule}", "train.steps=6", "train.eval_every=100")
    rates = [record["lr"] for record in trained(recipe)]
    assert rates == [learning_rate(recipe.optim, step, 6) for step in range(6)]
    assert (rates[0], rates[2], rates[5]) == (1.5e-3, 3e-3, pytest.approx(3e-4))


def test_it_learns(runs: Runs, tmp_path: Path) -> None:
    """From the first three steps to the last three; seeds 0 to 7 gain 0.95 to 1.11 and 0.52 to 0.72 nats."""
    settings = ["optim.lr=0.02", "train.global_batch_tokens=384", "train.micro_batch=4"]
    log = trained(runs.recipe(tmp_path, "train.steps=14", "train.eval_every=14", *settings))
    for source, gain in (("text", 0.5), ("recall", 0.3)):
        first, last = (mean(record[f"loss/{source}"] for record in part) for part in (log[:3], log[-3:]))
        assert last < first - gain, source


def test_recall_samples_from_shards(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are validated as one, plotted too."""
    monkeypatch.undo()
    build_mqar(MQARSpec((MQARSetting(16, 2), MQARSetting(24, 4)), vocab_size=64), [20, 20], tmp_path / "shards")
    source = f"[{{name: recall, kind: mqar, shards: {tmp_path}/shards}}]"
    recipe = runs.recipe(tmp_path / "run", f"data.sources={source}", f"data.validation={source}", "train.steps=2")
    (record,) = trained(recipe, "validation")
    assert 0 <= record["recall/all"] <= 1
    assert (tmp_path / "run" / "plots" / "recall.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_wandb_offline_goes_on_with_its_run(runs: Runs, tmp_path: Path) -> None:
    for steps in (2, 3):
        time.sleep(1.1)  # wandb names its folders by the second
        assert train(runs.recipe(tmp_path, "logging.wandb.mode=offline", f"train.steps={steps}")) == 0
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    (identity,) = {path.stem.removeprefix("run-") for path in files}
    manifest = json.loads((tmp_path / "checkpoints" / "step-00000003" / "manifest.json").read_text())
    assert manifest["progress"]["tracker"] == {"id": identity}
    assert train(runs.recipe(tmp_path, "logging.wandb.mode=offline", "train.steps=3")) == 0
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2, "a finished run starts no wandb run"


@pytest.mark.parametrize("segment_len", [12, 24], ids=["two segments", "one"])
def test_rows_of_so_few_segments_that_surprise_is_not_used(runs: Runs, tmp_path: Path, segment_len: int) -> None:
    """It is handed over from the second segment on, and has an effect from the third; what it is made from stays."""
    override = f"model.slots.segment_len={segment_len}"
    recipe = runs.recipe(tmp_path / "run", override, "optim.weight_decay=0")
    assert len(trained(recipe)) == 10
    after, initial = tensors(recipe.run_path, 10), build_model(recipe.model)
    InitialWeights(initial, recipe.seed).fill(initial)
    mix = "decoder.layers.0.slots.surprise_mix"
    assert torch.equal(after[f"model.{mix}"], initial.get_parameter(mix))
