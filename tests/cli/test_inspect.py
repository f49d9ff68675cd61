"""`slotmamba data inspect` on a recipe: what it prints agrees with the plan that training reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slotmamba.batch import training_plan
from slotmamba.cli import main
from slotmamba.config import load_recipe
from slotmamba_data import Tokenizer, build_text, train_tokenizer

RECIPE = """\
name: mixed
model: {{vocab_size: 400, d_model: 16, n_heads: 2, decoder_layers: 1, slots: {{factors: 2, factor_size: 4, top_k: 2}}}}
data:
  seq_len: 64
  packing: best_fit
  tokenizer: {folder}/tokenizer
  sources:
    - {{name: novel, shards: {folder}/shards, weight: 3}}
    - name: recall
      kind: mqar
      weight: 0
      weight_changes: [{{step: 10, weight: 1}}]
      mqar: {{vocab_size: 64, settings: [{{length: 32, pairs: 4, updates: 2}}, {{length: 32, pairs: 4, passes: 2}}]}}
train: {{steps: 40, global_batch_tokens: 512, micro_batch: 8}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    lines = [
        {"text": f"Document {n} of a novel. " * (1 + n % 7), "source": f"part {n % 2}", "id": n} for n in range(200)
    ]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, [*lines, *lines[:5]])))
    train_tokenizer([folder / "text.jsonl"], folder / "tokenizer", vocab_size=300)
    build_text([folder / "text.jsonl"], Tokenizer(folder / "tokenizer"), folder / "shards")
    (folder / "mixed.yaml").write_text(RECIPE.format(folder=folder))
    return folder / "mixed.yaml"


def test_the_data_of_a_recipe(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--output", str(tmp_path / "out"), "--duplicates", "--rows", "3", "--workers", "0,2"]
    assert main(["data", "inspect", str(recipe), *options]) == 0
    printed = capsys.readouterr().out
    assert "mixed: 320 rows of 64 tokens, 8 a step" in printed
    assert "duplicates  5 of 205 documents are there before" in printed
    assert "\n  part 0" in printed and "\n  part 1" in printed
    found = json.loads((tmp_path / "out/inspect.json").read_text())
    plan = training_plan(load_recipe(recipe))
    counts = plan.turns.counts(320)
    novel, recall = found["sources"]
    assert novel["asked"] == [1.0, 0.75] and recall["asked"] == [0.0, 0.25]
    assert novel["realised"][1] == counts[0] / 320 == pytest.approx((80 + 0.75 * 240) / 320, abs=1 / 320)
    assert (novel["documents"], recall["documents"]) == (205, None)
    contents = plan.describe()[0].contents
    assert (novel["rows_per_epoch"], novel["pad_share"]) == (contents.rows_per_epoch, contents.pad_share)
    assert novel["cut_share"] * 205 == pytest.approx(plan.cut_documents(0))
    assert sum(documents for _, _, documents in found["lengths"]) == 205
    assert set(found["tokens_per_second"]) == {"0", "2"} and min(found["tokens_per_second"].values()) > 0
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == ["lengths.png", "mixture.png", "throughput.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "out").glob("*.png"))
    assert "row 2, of step 1: row 2 of source 'novel'" in printed


def test_one_row(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = training_plan(load_recipe(recipe))
    recalled = next(number for number in range(80, 200) if plan.locate(number)[0] == 1)
    for number in (0, 7, recalled, 123_456):
        assert main(["data", "inspect", str(recipe), "--at", str(number)]) == 0
        printed = capsys.readouterr().out
        source, turn = plan.locate(number)
        name = plan.sources[source].name
        assert printed.startswith("the run ends after row 319\n") == (number > 319)
        found = printed.removeprefix("the run ends after row 319\n")
        assert found.startswith(f"row {number:,}, of step {number // 8 + 1:,}: row {turn:,} of source {name!r}\n")
        row = plan[number]
        for part in row.documents:
            assert (
                f"tokens {part.start:,} to {part.stop - 1:,} of document {part.document:,}, epoch {part.epoch}"
                in printed
            )
        if source == 0:
            assert "shard-000000.tar, document" in printed and "source part" in printed and "of a novel" in printed
        else:
            query = next(i for i, label in enumerate(row.labels) if label >= 0)
            assert "generated, sample" in printed and f" {row.tokens[query]}={row.labels[query]}" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{recipe}", "--document", "3"], "--document has no meaning for a recipe"),
        (["{recipe}", "--workers", "0,x"], "--workers 0,x: expected whole numbers, such as 0,1,2,4"),
        (["{recipe}", "--rows", "-1"], "--rows -1: expected at least 0"),
        (["{recipe}", "--at", "-1"], "rows are numbered from 0"),
        (["{recipe}", "data.seq_len=16"], "samples of 32 tokens do not fit rows of data.seq_len=16"),
        (["{shards}", "--at", "3"], "--at has no meaning for a folder of shards"),
        (["{shards}", "train.steps=3"], "key=value has no meaning for a folder of shards"),
        (["nothing"], "nothing"),
    ],
)
def test_what_makes_no_sense(recipe: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word.format(recipe=recipe, shards=recipe.parent / "shards") for word in words]
    assert main(["data", "inspect", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_shards(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = str(recipe.parent / "shards")
    assert main(["data", "inspect", shards, "--duplicates", "--quick", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "every byte" not in printed and "duplicates  5 of 205" in printed
    assert json.loads((tmp_path / "inspect.json").read_text())["manifest"]["documents"] == 205
    assert (tmp_path / "lengths.png").is_file()
