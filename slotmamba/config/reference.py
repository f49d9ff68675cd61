"""docs/recipes.md, made from the schema: ``python -m slotmamba.config.reference > docs/recipes.md``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from slotmamba.config import fields
from slotmamba.config.errors import Location

INTRODUCTION = """\
# Recipes

<!-- Generated from slotmamba/config/schema.py by `make docs`; edit the descriptions there. -->

A recipe is a YAML file that says everything about a run. `slotmamba train RECIPE` takes a path or the name of an
installed recipe; `slotmamba validate RECIPE --print` shows what it resolves to, all keys included.

- `extends: other.yaml` starts from another recipe: a file relative to this one, or the name of an installed recipe.
  Sections merge key by key; lists and values are replaced.
- `key=value` after RECIPE overrides a key: `optim.lr=3e-4`, `data.sources.0.shards=data/mine`. Values are YAML; later
  overrides win.
- `sweep.optim.lr=[1e-3,3e-4]` tries values for a key, as `sweep: {optim.lr: [1e-3, 3e-4]}` does in a file:
  `slotmamba submit` trains every combination of them ([slurm.md](slurm.md#sweeps)). `sweep.optim.lr=null` takes the
  key out again, `sweep=null` all keys.
- `${model.d_model}` inserts the value of another key.
- Relative paths are relative to the current working directory, wherever the recipe lies.
- Types are not converted: a number in quotes is text, and `1e3` is not an integer; write `1_000_000` for readability.
- Unknown keys, wrong types and impossible combinations are refused before anything starts, by exit code 2 and one line
  for each error that names the file or override, the key, what was expected and the nearest valid name.
"""


def recipe_reference() -> str:
    """Every key of a recipe as markdown: a table for each section, with type, default and description."""
    return "\n".join([INTRODUCTION, *_section((), "Top level", {})])


def key_list() -> str:
    """Every key that holds a value, one a line with its description, for ``--help``."""
    lines = []
    for location, node in fields.walk():
        if location[:2] != ("data", "validation") and not fields.sub_keys(node):
            lines.append(f"  {_pattern(location):33} {node['description']}")
    return "\n".join(lines)


def _section(location: Location, title: str, anchors: dict[str, str]) -> Iterator[str]:
    """The table of a section and then those of the sections in it.

    `anchors` collects where each kind of section is described: data.validation holds what data.sources holds, and one
    description serves both.
    """
    node = fields.node_at(location)
    assert node is not None
    yield f"## {title}\n"
    if location:
        yield f"{node['description']}\n"
    yield "| key | value | default | |"
    yield "|---|---|---|---|"
    entry: Location = (*location, 0) if fields.scalar_type(node) == "array" else location
    below: list[Location] = []
    for key in fields.sub_keys(node):
        child_location: Location = (*entry, key)
        child = fields.node_at(child_location)
        assert child is not None
        value = _value(child)
        if fields.sub_keys(child):
            name = fields.section_name(child)
            if name not in anchors:
                anchors[name] = _pattern(child_location).replace(".", "").lower()
                below.append(child_location)
            value = f"[{value}](#{anchors[name]})"
        yield f"| `{key}` | {value} | {_default(child)} | {child['description']} |"
    yield ""
    for subsection in below:
        yield from _section(subsection, f"`{_pattern(subsection)}`", anchors)


def _pattern(location: Location) -> str:
    """The dotted key with N for the number of a list's entry: ``data.sources.N.shards``."""
    return fields.dotted(["N" if isinstance(part, int) else part for part in location])


def _value(node: fields.Node) -> str:
    if fields.sub_keys(node):
        return "list of sections" if fields.scalar_type(node) == "array" else "section"
    choices = fields.choices(node)
    return " \\| ".join(f"`{choice}`" for choice in choices) if choices else fields.describe(node)


def _default(node: fields.Node) -> str:
    if "default" not in node:
        return "required"
    return "" if fields.sub_keys(node) and node["default"] not in (None, []) else f"`{json.dumps(node['default'])}`"


if __name__ == "__main__":
    sys.stdout.write(recipe_reference())
