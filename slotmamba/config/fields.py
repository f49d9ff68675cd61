"""What the schema says about a key, for error messages, help texts and docs/recipes.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from slotmamba.config.schema import Recipe

Node = dict[str, Any]
"""A node of the recipe's JSON schema."""

SCALARS = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "a string"}


@cache
def recipe_node() -> Node:
    """The JSON schema of a whole recipe."""
    return Recipe.model_json_schema()


def _resolve(node: Node) -> Node:
    """Follow a ``$ref``; what stands beside it (description, default) wins over what it points to."""
    reference = node.get("$ref")
    if reference is None:
        return node
    return {**recipe_node()["$defs"][reference.removeprefix("#/$defs/")], **node}


def _without_null(node: Node) -> Node:
    """The one alternative of an optional value that is not null."""
    alternatives = [option for option in node.get("anyOf", [node]) if option.get("type") != "null"]
    assert len(alternatives) == 1, f"the schema has a union that is not `X | None`: {node}"
    return _resolve(alternatives[0])


def node_at(location: Sequence[str | int]) -> Node | None:
    """The schema node of a key such as ``("data", "sources", 0, "shards")``, or None if there is no such key."""
    node: Node | None = recipe_node()
    for part in location:
        if node is None:
            return None
        node = _without_null(_resolve(node))
        if isinstance(part, str):
            node = node.get("properties", {}).get(part)
        else:
            node = node["prefixItems"][0] if "prefixItems" in node else node.get("items")
    return None if node is None else _resolve(node)


def sub_keys(node: Node) -> list[str]:
    """The keys of a section, or of one entry of a list of sections; none for a plain value."""
    node = _without_null(_resolve(node))
    if "items" in node:
        return sub_keys(node["items"])
    return list(node.get("properties", {}))


def section_name(node: Node) -> str:
    """The name of the kind of section that `node` is or lists, the same wherever that kind is used."""
    node = _without_null(_resolve(node))
    return section_name(node["items"]) if "items" in node else str(node["title"])


def walk(location: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Node]]:
    """Every key below `location` with its node, depth first, in the schema's order; entry 0 stands for any entry."""
    node = node_at(location)
    assert node is not None
    inner = _without_null(node)
    if "items" in inner and sub_keys(inner):
        yield from walk((*location, 0))
    for key in inner.get("properties", {}):
        child = node_at((*location, key))
        assert child is not None
        yield (*location, key), child
        yield from walk((*location, key))


def default_values() -> dict[str, Any]:
    """The keys that have a default, in their sections; nothing for the entries of lists."""
    values: dict[str, Any] = {}
    for location, node in walk():
        *sections, key = (part for part in location if isinstance(part, str))
        if len(location) > len(sections) + 1 or "default" not in node or _is_section(node):
            continue
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = node["default"]
    return values


def _is_section(node: Node) -> bool:
    return "properties" in _without_null(_resolve(node))


def choices(node: Node) -> list[str]:
    """The values that an enumerated key may take; none where it is not enumerated."""
    node = _without_null(_resolve(node))
    return node["enum"] if "enum" in node else [node["const"]] if "const" in node else []


def scalar_type(node: Node) -> str:
    """JSON schema's name of the type: integer, number, boolean, string, array or object."""
    return str(_without_null(_resolve(node))["type"])


def takes_text(node: Node, text: str) -> bool:
    """Whether `text`, as a string, may be the value of the key."""
    node = _without_null(_resolve(node))
    return node["type"] == "string" and re.search(node.get("pattern", ""), text) is not None


def _bounds(node: Node) -> str:
    low, high = node.get("minimum"), node.get("maximum")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "more than",
        "maximum": "at most",
        "exclusiveMaximum": "less than",
    }
    return " and".join(f" {word} {node[key]:g}" for key, word in words.items() if key in node)


def describe(node: Node) -> str:
    """What a value has to be, in words: "an integer at least 1 or null", "cosine, wsd or linear"."""
    node = _resolve(node)
    if "anyOf" in node:
        return f"{describe(_without_null(node))} or null"
    if "words" in node:
        return str(node["words"])
    if choices(node):
        *others, last = choices(node)
        return f"{', '.join(others)} or {last}" if others else last
    if node["type"] == "array":
        if "prefixItems" in node:
            return f"a list of {len(node['prefixItems'])}, each {describe(node['prefixItems'][0])}"
        at_least = f" of {node['minItems']} or more" if node.get("minItems") else ""
        return f"a list{at_least}, each {describe(node['items'])}"
    if node["type"] == "object":
        return f"a section with the keys {', '.join(sub_keys(node))}"
    if node.get("format") == "path":
        return "a path"
    return SCALARS[node["type"]] + _bounds(node)


def dotted(location: Sequence[str | int]) -> str:
    """The key as one writes it on the command line: ``data.sources.0.shards``."""
    return ".".join(map(str, location))
