"""Mixtures in the training loop: shares and losses by source in metrics.jsonl, curricula, and sources that run out."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from slotmamba.batch import training_plan
from slotmamba.config import Recipe, load_recipe
from slotmamba.train import train
from slotmamba_data import Tokenizer, build_text, open_text, train_tokenizer
from tests.train.runs import Runs, assert_same_run, records

pytestmark = [pytest.mark.usefixtures("without_plots"), pytest.mark.timeout(300)]


def test_shares_losses_and_epochs_are_recorded(runs: Runs, tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, "train.steps=30", "data.sources.0.weight=1", "data.sources.1.weight=3")
    assert train(recipe) == 0
    log = records(tmp_path, "train")
    plan = training_plan(recipe)
    rows = plan.describe()[1].contents.rows_per_epoch
    assert rows is not None
    for step, record in enumerate(log, 1):
        counts = plan.turns.counts(step * recipe.rows_per_step)
        assert record["share/recall"] + record["share/text"] == pytest.approx(1)
        assert record["share/text"] == counts[1] / sum(counts)
        assert record["epochs/text"] == counts[1] / rows
        assert "epochs/recall" not in record and 0 <= record["pad_share"] < 0.5
        assert {"loss/text", "loss/recall"} <= record.keys()
    assert log[-1]["share/text"] == pytest.approx(0.75, abs=1 / sum(counts))


def test_a_curriculum_goes_by_steps_and_resumes(runs: Runs, tmp_path: Path) -> None:
    settings = [
        "train.steps=12",
        "train.checkpoint.every=4",
        "data.sources.0.weight=0",
        "data.sources.0.weight_changes=[{step: 3, weight: 0}, {step: 9, weight: 1, linear: true}]",
        "data.sources.1.weight=1",
        "data.sources.1.weight_changes=[{step: 9, weight: 0}]",
    ]
    assert train(runs.recipe(tmp_path / "whole", *settings)) == 0
    log = records(tmp_path / "whole", "train")
    assert ["loss/recall" in record for record in log[:3]] == [False] * 3
    shares = [record["share/recall"] for record in log]
    assert shares[2] == 0 and shares == sorted(shares) and shares[-1] > shares[8] > shares[5]
    assert ["loss/text" in record for record in log[9:]] == [False] * 3  # only recall is left
    assert train(runs.recipe(tmp_path / "parts", *settings, "train.steps=5")) == 0
    assert train(runs.recipe(tmp_path / "parts", *settings)) == 0
    ours, theirs = (records(tmp_path / name, "train") for name in ("parts", "whole"))
    assert [record["share/recall"] for record in ours] == [record["share/recall"] for record in theirs]


def test_weights_changed_in_the_recipe_hold_from_the_resume_on(runs: Runs, tmp_path: Path) -> None:
    def recipe(steps: int, weight: float, *more: str) -> Recipe:
        return runs.recipe(tmp_path, f"train.steps={steps}", f"data.sources.1.weight={weight}", *more)

    only_text = "data.sources.0.weight_changes=[{step: 20, weight: 0}]"
    for steps, weight, more in ((6, 1.0, []), (14, 9.0, []), (24, 9.0, [only_text]), (28, 9.0, [only_text])):
        assert train(recipe(steps, weight, *more)) == 0
    log = records(tmp_path, "train")
    rows = recipe(6, 1.0).rows_per_step
    text = [record["share/text"] * record["step"] * rows for record in log]
    start = recipe(6, 1.0).data.sources[0].weight

    def gained(first: int, last: int) -> float:
        return (text[last - 1] - (text[first - 1] if first else 0)) / ((last - first) * rows)

    assert gained(0, 6) == pytest.approx(1 / (1 + start), abs=1 / (6 * rows))
    assert gained(6, 14) == pytest.approx(9 / (9 + start), abs=1.1 / (8 * rows))
    assert gained(20, 28) == 1
    changes = [change for record in records(tmp_path, "recipe") for change in record["changes"]]
    assert any(change.startswith("data.sources was") for change in changes)


def test_a_source_that_stops_ends_the_run(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = runs.recipe(tmp_path, "train.steps=1000", "data.sources.1.on_exhausted=stop", "data.sources.1.weight=20")
    ends = training_plan(recipe).ends()
    assert ends is not None
    steps = ends[0] // recipe.rows_per_step
    assert 2 < steps < 200
    assert train(recipe) == 0
    printed = capsys.readouterr().out
    assert f"ends after step {steps}, where source 'text' is exhausted" in printed
    assert f"finished {steps} steps" in printed
    log = records(tmp_path, "train")
    assert log[-1]["step"] == steps and log[-1]["epochs/text"] <= 1 < log[-1]["epochs/text"] * (steps + 2) / steps
    assert log[-1]["lr"] == pytest.approx(recipe.optim.lr * recipe.optim.min_lr_ratio)
    assert train(recipe) == 0
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"source 'text' is exhausted after .* too few for a run with optim\.warmup=900"
    ):
        train(recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"warmup": 900})}))


def test_documents_fitted_whole_train_and_resume(runs: Runs, tmp_path: Path) -> None:
    settings = ["data.packing=best_fit", "train.steps=8", "train.checkpoint.every=3", "train.checkpoint.keep=9"]
    assert train(runs.recipe(tmp_path / "whole", *settings)) == 0
    assert train(runs.recipe(tmp_path / "parts", *settings, "train.steps=3")) == 0
    with pytest.raises(ValueError, match=r"source text: packing \(was best_fit, is concat\)"):
        train(runs.recipe(tmp_path / "parts", *settings, "data.packing=concat"))
    assert train(runs.recipe(tmp_path / "parts", *settings)) == 0
    ours, theirs = (records(tmp_path / name, "train")[-1] for name in ("parts", "whole"))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.2)  # the learning rate went another way
    assert ours["epochs/text"] == theirs["epochs/text"]


def test_damaged_documents_are_left_out_and_counted(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(Path(runs.recipe(tmp_path).data.sources[1].shards), tmp_path / "shards")
    path = tmp_path / "shards/shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    settings = [f"data.sources.1.shards={tmp_path / 'shards'}", "train.steps=3"]
    with pytest.raises(ValueError, match=r"shard-000000\.tar is damaged between bytes 0 and"):
        train(runs.recipe(tmp_path / "error", *settings))
    for name in ("skip", "again"):
        assert train(runs.recipe(tmp_path / name, *settings, "data.on_corrupt=skip")) == 0
    assert_same_run(tmp_path / "again", tmp_path / "skip")
    counts = [record["skipped_documents"] for record in records(tmp_path / "skip", "train")]
    assert 0 < counts[0] < counts[-1] <= 4, "of the four documents, not of the rows that have a part of one"


def test_workers_change_nothing_but_who_reads(runs: Runs, tmp_path: Path) -> None:
    settings = ["train.steps=8", "train.checkpoint.every=3"]
    assert train(runs.recipe(tmp_path / "plain", *settings)) == 0
    assert train(runs.recipe(tmp_path / "ahead", *settings, "data.workers=2")) == 0
    assert_same_run(tmp_path / "ahead", tmp_path / "plain")
    for later in ("step-00000006", "step-00000008"):
        shutil.rmtree(tmp_path / "ahead/checkpoints" / later)
    assert train(runs.recipe(tmp_path / "ahead", *settings, "data.workers=1")) == 0
    assert_same_run(tmp_path / "ahead", tmp_path / "plain")
    assert multiprocessing.active_children() == []


def test_steps_of_a_curriculum_are_steps_also_after_another_batch_size(runs: Runs, tmp_path: Path) -> None:
    """Twice the rows a step from step 4 on: recall sets in at step 8, which is row 4 * 4 + 4 * 8 and not 8 * 8."""
    settings = ["data.sources.0.weight=0", "data.sources.0.weight_changes=[{step: 8, weight: 1}]"]
    assert train(runs.recipe(tmp_path, *settings, "train.steps=4")) == 0
    batch = runs.recipe(tmp_path).train.global_batch_tokens
    assert train(runs.recipe(tmp_path, *settings, "train.steps=12", f"train.global_batch_tokens={2 * batch}")) == 0
    log = records(tmp_path, "train")
    assert [record["tokens"] // batch for record in log] == [1, 2, 3, 4, *range(6, 21, 2)]
    assert ["loss/recall" in record for record in log] == [False] * 8 + [True] * 4


@pytest.mark.slow
def test_the_recipe_that_mixes_text_and_recall(tmp_path: Path) -> None:
    """mixture-tiny as its comment says, on small data: shares and losses by source are in metrics.jsonl."""
    pages = [text for _, text in zip(range(60), open_text("austen:test", document_bytes=2048), strict=False)]
    lines = [json.dumps({"text": text, "source": f"novel {number % 2}"}) for number, text in enumerate(pages)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    data = tmp_path / "data"
    train_tokenizer(["austen:val", tmp_path / "corpus.jsonl"], data / "tokenizer", vocab_size=1000, weights=(1.0, 1.0))
    for name, source in (("austen", "austen:val"), ("corpus", tmp_path / "corpus.jsonl")):
        build_text([source], Tokenizer(data / "tokenizer"), data / name, document_bytes=2048)
    recipe = load_recipe(
        "mixture-tiny",
        [
            f"run_dir={tmp_path / 'run'}",
            f"data.tokenizer={data / 'tokenizer'}",
            *(f"data.{key}.{n}.shards={data / name}" for key in ("sources", "validation")
              for n, name in enumerate(("austen", "corpus"))),
            "data.sources.2.weight_changes=[{step: 2, weight: 0}, {step: 6, weight: 2, linear: true}]",
            "train={steps: 10, log_every: 1, eval_every: 10, eval_rows: 4}",
            "optim.warmup=2",
        ],
    )  # fmt: skip
    assert train(recipe) == 0
    log = records(tmp_path / "run", "train")
    counts = training_plan(recipe).turns.counts(10 * recipe.rows_per_step)
    names = ["austen", "corpus", "recall"]
    assert [log[-1][f"share/{name}"] for name in names] == [count / sum(counts) for count in counts]
    assert log[1]["share/recall"] == 0 < log[-1]["share/recall"] < 0.25
    assert log[0]["share/corpus"] == pytest.approx(5 / 6, abs=1 / recipe.rows_per_step)
    assert {f"loss/{name}" for name in names} <= log[-1].keys() and {"epochs/austen", "epochs/corpus"} <= log[-1].keys()
    validated = {record["source"]: record for record in records(tmp_path / "run", "validation")}
    settings = {"64x4", "64x8_updates4", "128x16_passes2", "256x32"}
    assert validated.keys() == set(names) and {f"recall/{each}" for each in settings} <= validated["recall"].keys()


def test_a_source_that_stops_ends_the_run_after_another_batch_size_too(runs: Runs, tmp_path: Path) -> None:
    """Within a step of the source's last row, whatever its batches were on the way."""
    settings = ["data.sources.1.on_exhausted=stop", "data.sources.1.weight=20", "optim.warmup=1"]
    recipe = runs.recipe(tmp_path, *settings)
    batch, rows, ends = recipe.train.global_batch_tokens, recipe.rows_per_step, training_plan(recipe).ends()
    assert ends is not None and ends[0] > 6 * rows
    assert train(runs.recipe(tmp_path, *settings, "train.steps=3")) == 0
    assert train(runs.recipe(tmp_path, *settings, "train.steps=1000", f"train.global_batch_tokens={2 * batch}")) == 0
    read = records(tmp_path, "train")[-1]["tokens"] // recipe.data.seq_len
    assert ends[0] - 2 * rows < read <= ends[0]


def test_tokens_asked_for_are_those_after_another_batch_size_too(runs: Runs, tmp_path: Path) -> None:
    batch = runs.recipe(tmp_path).train.global_batch_tokens
    settings = ["train.steps=null", f"train.tokens={9 * batch}", "optim.warmup=1"]
    assert train(runs.recipe(tmp_path, "train.steps=3")) == 0
    assert train(runs.recipe(tmp_path, *settings, f"train.global_batch_tokens={2 * batch}")) == 0
    assert records(tmp_path, "train")[-1]["tokens"] == 9 * batch
