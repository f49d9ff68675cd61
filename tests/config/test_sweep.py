"""A sweep is the recipes of its cells: their order, names and folders, and what no cell may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from slotmamba.cli import main
from slotmamba.config import RecipeError, load_recipe, save_recipe
from slotmamba.config.cells import load_sweep
from tests.config.conftest import BASE
from tests.train.runs import fails

SWEEP = BASE + "sweep: {optim.lr: [1e-3, 3e-4], model.slots.top_k: [4, 8]}\n"
NAMES = [f"optim.lr={lr},model.slots.top_k={k}" for lr in ("0.001", "0.0003") for k in (4, 8)]


@pytest.fixture
def swept(folder: Path) -> Path:
    """The working directory, with a valid sweep in sweep.yaml."""
    (folder / "sweep.yaml").write_text(SWEEP)
    return folder


def names(*overrides: str, recipe: str = "base.yaml") -> list[str]:
    return [cell.name for cell in load_sweep(recipe, overrides).cells]


def test_cells(swept: Path) -> None:
    sweep = load_sweep("sweep.yaml", ["seed=3"])
    assert [cell.name for cell in sweep.cells] == NAMES
    last = sweep.cells[-1]
    assert last.settings == {"optim.lr": 3e-4, "model.slots.top_k": 8}
    own = ["optim.lr=3e-4", "model.slots.top_k=8", f"run_dir=runs/base/{NAMES[-1]}"]
    expected = load_recipe("base.yaml", ["seed=3", *own])
    assert last.recipe == expected.model_copy(update={"name": f"base:{NAMES[-1]}"})


@pytest.mark.parametrize(
    "overrides",
    [
        ["sweep.optim.lr=[1e-3,3e-4]", "sweep.model.slots.top_k=[4,8]"],
        ["sweep={optim.lr: [1e-3, 3e-4], model: {slots: {top_k: [4, 8]}}}"],
        ["sweep={optim: {lr: [5, 6]}, seed: [1]}", "sweep.optim.lr=[1e-3,3e-4]", "sweep.seed=null",
         "sweep.model.slots.top_k=[4,8]"],
    ],
)  # fmt: skip
def test_written_in_other_ways(folder: Path, overrides: list[str]) -> None:
    assert names(*overrides) == NAMES


def test_an_inherited_sweep(swept: Path) -> None:
    (swept / "more.yaml").write_text("extends: sweep.yaml\nsweep: {optim: {lr: [0.5]}, seed: [1, 2]}")
    assert names("sweep.model.slots.top_k=null", recipe="more.yaml") == ["optim.lr=0.5,seed=1", "optim.lr=0.5,seed=2"]
    assert load_recipe("more.yaml", ["sweep=null"]).sweep is None
    assert load_recipe("sweep.yaml", ["sweep.optim.lr=null", "sweep.model.slots.top_k=null"]).sweep is None


def test_a_sweep_saves(swept: Path) -> None:
    recipe = load_recipe("sweep.yaml")
    save_recipe(recipe, "saved.yaml")
    assert load_recipe("saved.yaml") == recipe
    assert names(recipe="saved.yaml") == NAMES


def test_other_keys_follow_those_of_the_cell(folder: Path) -> None:
    cells = load_sweep("base.yaml", ["sweep.train.steps=[10,20]", "optim.warmup=${train.steps}"]).cells
    assert [cell.recipe.optim.warmup for cell in cells] == [10, 20]


def test_names_are_those_of_files(folder: Path) -> None:
    """Values that a name cannot say in full are told apart by a digest, the same one every time."""
    tried = "sweep.data.tokenizer=[a/b c, '12', 12-34, x, some/long/path/to/a/tokenizer, some/long/path/to/a/token, ..]"
    found = [name.removeprefix("data.tokenizer=") for name in names(tried)]
    assert found[0] == "a-b-c-900cef" and found[1:4] == ["12", "12-34", "x"]
    assert found[4].startswith("some-long-path-to-a-toke-") and found[5].startswith("some-long-path-to-a-toke-")
    assert len(set(found)) == 7 and found == [name.removeprefix("data.tokenizer=") for name in names(tried)]
    assert names("sweep.model.decoder_attn_layer=[null,-2]", "sweep.model.tie_embeddings=[false]") == [
        "model.decoder_attn_layer=null,model.tie_embeddings=false",
        "model.decoder_attn_layer=-2,model.tie_embeddings=false",
    ]
    assert names("sweep.optim=[{lr: 1.0, warmup: 3}, {lr: 2.0}]")[1].startswith("optim=lr-2.0-")
    long = names(*(f"sweep.data.sources.{number}.weight=[0.123456789012345]" for number in (0, 1)),
                 "sweep.optim.min_lr_ratio=[0.1,0.2]", "sweep.optim.weight_decay=[0.123456789]")  # fmt: skip
    assert len(set(long)) == 2 and all(len(name) == 120 for name in long)


def test_a_value_that_looks_like_an_interpolation(folder: Path) -> None:
    (folder / "sweep.yaml").write_text(BASE + r"sweep: {data.tokenizer: ['\${seed}']}")
    (cell,) = load_sweep("sweep.yaml").cells
    assert cell.recipe.data.tokenizer == "${seed}"


KEYS = [
    ("optim.lr=1e-3", "expected a list of values to try, got 0.001"),
    ("optim.lr=[]", "expected a list of values to try, got []"),
    ("optim.lr=[1e-3,0.001]", "expected different values, got [0.001, 0.001]"),
    ("seed.x=[1]", "expected keys that do not hold one another: sweep.seed sets it too"),
    ("name=[a,b]", "cannot be tried: cells are named for the values that they try"),
    ("run_dir=[a,b]", "cannot be tried: every cell has a folder of its own in the run_dir of the sweep"),
    ("slurm.nodes=[1,2]", "cannot be tried: all cells are one job array, whose jobs ask for the same"),
    ("sweep.seed=[1,2]", "cannot be tried: a cell is a run, not a sweep"),
]


@pytest.mark.parametrize(("override", "message"), KEYS, ids=[override for override, _ in KEYS])
def test_wrong_key(folder: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_sweep("base.yaml", ["sweep.seed=[1]", f"sweep.{override}"])
    assert str(caught.value) == f"override sweep.{override}: sweep.{override.partition('=')[0]}: {message}"


CELLS = [
    (["sweep.optim.lrr=[1,2]"], "cell optim.lrr=1: optim.lrr: unknown key; did you mean optim.lr?"),
    (["sweep.optimm.lr=[1,2]"], "cell optimm.lr=1: optimm: unknown key; did you mean optim?"),
    (
        ["sweep.seed=[1,2]", "sweep.optim.lr=[1e-3,-1]"],
        "cell seed=1,optim.lr=-1: optim.lr: expected a number more than 0, got -1",
    ),
    (["sweep.optim.lr=[fast]"], "cell optim.lr=fast: optim.lr: expected a number more than 0, got 'fast'"),
    (
        ["sweep.model.d_model=[64,65]"],
        "cell model.d_model=65: base.yaml with overrides: model: d_model=65 is not divisible by n_heads=4",
    ),
    (["sweep.data.sources.2.weight=[1]"], "cell data.sources.2.weight=1: list index out of range"),
    (["sweep=[1]"], "override sweep=[1]: sweep: expected keys with a list of values each, got [1]"),
    (
        ["sweep.seed=[1]", "seed=2"],
        "override seed=2: the sweep sets seed in every cell; sweep.seed=null takes it out of the sweep",
    ),
    (
        ["sweep.parallel.shard=[1,2]", "parallel.engine=fsdp2", "train.micro_batch=1"],
        "cell parallel.shard=2: parallel.replicate * parallel.shard = 2 processes, not 1 as in cell parallel.shard=1: "
        "all cells are one job array, whose jobs ask for the same",
    ),
    (
        ["sweep.optim.warmup=[1,2]", "slurm.nodes=${optim.warmup}"],
        "cell optim.warmup=2: its section slurm is not that of cell optim.warmup=1",
    ),
    ([f"sweep.seed={list(range(1001))}"], "base.yaml: sweep: 1,001 cells, expected 1,000 at most"),
]


@pytest.mark.parametrize(("overrides", "message"), CELLS, ids=[message[:40] for _, message in CELLS])
def test_wrong_sweep(folder: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_sweep("base.yaml", overrides)
    assert str(caught.value) == message


def test_each_thing_that_is_wrong_is_said_once(folder: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_sweep("base.yaml", ["sweep.optim.lr=[0,1e-3]", "sweep.optim.warmup=[1,11]"])
    assert str(caught.value).splitlines() == [
        "cell optim.lr=0,optim.warmup=1: optim.lr: expected a number more than 0, got 0",
        "cell optim.lr=0.001,optim.warmup=11: base.yaml with overrides: optim.warmup=11 is more than the 10 steps "
        "of the run",
    ]


def test_commands(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`validate` checks all cells, `estimate` all and the largest in full, `train` names another command."""
    assert main(["validate", "sweep.yaml", "sweep.data.sources.0.shards=[data/text,data/other]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["base: ok, a sweep of 8 cells", f"  {NAMES[0]},data.sources.0.shards=data-text-fad785"]
    assert [line.partition(" data/")[2].partition(" ")[0] for line in lines[9:]] == ["text", "code", "other"]
    assert main(["estimate", "sweep.yaml", "sweep.model.decoder_layers=[1,3]"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"base:{NAMES[1]},model.decoder_layers=3")
    assert [line.split()[0] for line in out.splitlines()[-8:]] == [
        f"{name},model.decoder_layers={layers}" for name in NAMES for layers in (1, 3)
    ]
    for command in (["train"], ["train", "--dry-run"]):
        said = fails(capsys, [*command, "sweep.yaml"], code=2)
        assert said.startswith("base is a sweep over optim.lr, model.slots.top_k: `slotmamba submit` trains it, ")
    said = fails(capsys, ["submit", "sweep.yaml", "cluster=debug"], code=2)
    assert said == "cluster=debug is one run in this process, not a sweep: set cluster=local, or sweep=null"
