"""docs/recipes.md says what the schema says."""

from __future__ import annotations

from slotmamba.config import fields
from slotmamba.config.reference import key_list, recipe_reference
from slotmamba.installed import checkout_root


def test_the_committed_reference_is_up_to_date() -> None:
    root = checkout_root()
    assert root is not None
    committed = (root / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert committed == recipe_reference(), "docs/recipes.md is not what the schema says: run `make docs`"


def test_every_key_has_a_description() -> None:
    assert [fields.dotted(location) for location, node in fields.walk() if not node.get("description")] == []


def test_reference_describes_each_kind_of_section_once() -> None:
    text = recipe_reference()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert "## `data.sources.N.mqar.settings`" in headings
    assert "| `validation` | [list of sections](#datasources) | `[]` |" in text
    assert len(headings) == len(set(headings))


def test_help_lists_keys_with_descriptions() -> None:
    lines = key_list().splitlines()
    assert "  optim.lr                          Peak learning rate." in lines
    assert any(line.split()[0] == "data.sources.N.shards" for line in lines)
