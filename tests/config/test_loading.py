"""Recipes load, extend, interpolate, take overrides, and save to what loads back equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from slotmamba.config import Recipe, installed_recipes, load_recipe, save_recipe


def test_base_recipe(folder: Path) -> None:
    recipe = load_recipe("base.yaml")
    assert (recipe.name, recipe.model.d_model, recipe.optim.lr) == ("base", 64, 1e-3)
    assert [source.name for source in recipe.data.sources] == ["text", "code"]
    assert recipe == load_recipe(folder / "base.yaml")


def test_extends_merges_sections_and_replaces_lists(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "middle.yaml").write_text("extends: ../base.yaml\noptim: {lr: 2e-3}\nseed: 1")
    (folder / "top.yaml").write_text(
        "extends: sub/middle.yaml\nname: top\ndata: {sources: [{name: only, shards: x}]}\noptim: {schedule: wsd}"
    )
    recipe = load_recipe("top.yaml")
    assert (recipe.name, recipe.seed) == ("top", 1)
    assert (recipe.optim.lr, recipe.optim.warmup, recipe.optim.schedule) == (2e-3, 2, "wsd")
    assert recipe.data.seq_len == 64
    assert [source.name for source in recipe.data.sources] == ["only"]


def test_interpolation_sees_the_overridden_value(folder: Path) -> None:
    (folder / "x.yaml").write_text("extends: base.yaml\nname: width-${model.d_model}")
    assert load_recipe("x.yaml").name == "width-64"
    assert load_recipe("x.yaml", ["model.d_model=128"]).name == "width-128"
    assert load_recipe("x.yaml", ["seed=${model.n_heads}"]).seed == 4


@pytest.mark.parametrize("key", ["data.sources.1.shards", "data.sources[1].shards"])
def test_override_of_a_list_entry(folder: Path, key: str) -> None:
    recipe = load_recipe("base.yaml", [f"{key}=elsewhere"])
    assert [source.shards for source in recipe.data.sources] == ["data/text", "elsewhere"]


def test_overrides_are_yaml_and_the_last_wins(folder: Path) -> None:
    overrides = [
        "optim.lr=3e-4",
        "optim.lr=1e-4",
        "optim={schedule: linear}",
        "model.decoder_attn_layer=-2",
        "model.tie_embeddings=false",
        "data.tokenizer=a=b",
        "train.steps=null",
        "train.tokens=1_000_000",
        "data.sources=[{name: only, shards: x}]",
    ]
    recipe = load_recipe("base.yaml", overrides)
    assert (recipe.optim.lr, recipe.optim.warmup, recipe.optim.schedule) == (1e-4, 2, "linear")
    assert (recipe.model.decoder_attn_layer, recipe.model.tie_embeddings) == (-2, False)
    assert recipe.data.tokenizer == "a=b"
    assert (recipe.train.steps, recipe.train.tokens) == (None, 1_000_000)
    assert len(recipe.data.sources) == 1


def test_override_of_a_section_that_is_empty_in_the_file(folder: Path) -> None:
    (folder / "x.yaml").write_text("extends: base.yaml\noptim:")
    assert load_recipe("x.yaml", ["optim.lr=0.5"]).optim.lr == 0.5


def test_recipe_files_do_not_need_a_suffix_or_a_place(folder: Path) -> None:
    """A file in the working directory comes before an installed recipe of the same name."""
    name = next(iter(installed_recipes()))
    installed = load_recipe(name)
    assert load_recipe(f"{name}.yaml") == installed
    (folder / f"{name}.yaml").write_text("extends: base.yaml\nname: mine")
    assert load_recipe(f"{name}.yaml").name == "mine"
    assert load_recipe(name) == installed


def test_extending_an_installed_recipe(folder: Path) -> None:
    for name, written in (("mqar-tiny", "mqar-tiny"), ("mqar-tiny", "mqar-tiny.yaml")):
        (folder / "x.yaml").write_text(f"extends: {written}\nseed: 7")
        assert load_recipe("x.yaml") == load_recipe(name, ["seed=7"])


def test_the_demo_recipes_are_installed() -> None:
    assert {"mqar-tiny", "lm-tiny"} <= set(installed_recipes())


@pytest.mark.parametrize("name", installed_recipes())
def test_every_installed_recipe_is_valid_and_saves(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    "text",
    ["1e-3", "yes", "null", "12", "2020-01-01", "0x10", "~", "${model.d_model}", r"\${x}", r"a\b", "a: b", "# x", " y ",
     "é", "'", '"', "{a}", "[", "a\nb"],
)  # fmt: skip
def test_saved_strings_load_back_equal(folder: Path, text: str) -> None:
    recipe = load_recipe("base.yaml")
    content = recipe.model_dump()
    content["data"]["tokenizer"] = text
    recipe = Recipe.model_validate(content)
    save_recipe(recipe, "saved.yaml")
    assert load_recipe("saved.yaml") == recipe
    assert recipe.data.tokenizer == text


def test_saving_leaves_nothing_but_the_file(folder: Path) -> None:
    recipe = load_recipe("base.yaml", ["run_dir=a/b", "optim.betas=[0.8, 0.9]", "optim.eps=1e-12"])
    save_recipe(recipe, "saved.yaml")
    save_recipe(recipe, "saved.yaml")
    assert load_recipe("saved.yaml") == recipe
    assert sorted(path.name for path in folder.iterdir()) == ["base.yaml", "saved.yaml"]
