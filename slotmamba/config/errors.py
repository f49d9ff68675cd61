"""Recipe errors: one line each, with the file or override, the key, what was expected, and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slotmamba.config import fields
from slotmamba.errors import InputError, one_line, suggestion

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

Location = tuple[str | int, ...]


class RecipeError(InputError):
    """A recipe that cannot be used. ``str(error)`` has one line for each thing that is wrong."""


@dataclass(frozen=True)
class Layer:
    """Where keys came from: a file, or an override on the command line."""

    origin: str
    content: dict[Any, Any]
    is_override: bool = False

    def sets(self, location: Location) -> bool:
        """Whether the value at `location` was written by this layer, itself or with something around it."""
        node: Any = self.content
        for part in location:
            if isinstance(node, dict):
                if part not in node:
                    return False
                node = node[part]
            elif isinstance(node, list) and isinstance(part, int) and part < len(node):
                node = node[part]
            else:
                return not isinstance(node, list)
        return True


def explain(error: ValidationError, layers: Sequence[Layer], recipe: str) -> RecipeError:
    """Turn pydantic's report into a RecipeError.

    Args:
        error: the errors of validating a whole Recipe.
        layers: the files from the most basic to `recipe` itself, then the overrides, as they were merged.
        recipe: name of the recipe's own file, for errors that no single key is to blame for.
    """
    return RecipeError("\n".join(_line(details, layers, recipe) for details in error.errors()))


def _line(details: ErrorDetails, layers: Sequence[Layer], recipe: str) -> str:
    location: Location = details["loc"]
    key = fields.dotted(location)
    if details["type"] == "value_error":  # from a validator of ours: about several keys of the section at once
        overridden = any(layer.is_override and layer.sets(location) for layer in layers)
        origin = f"{recipe} with overrides" if overridden else recipe
        return one_line(f"{origin}: {key + ': ' if key else ''}{details['ctx']['error']}")
    if details["type"] == "missing":
        node = fields.node_at(location)
        assert node is not None
        return one_line(f"{origin_of(location[:-1], layers, recipe)}: {key}: missing, expected {fields.describe(node)}")
    origin = origin_of(location, layers, recipe)
    node = fields.node_at(location)
    if node is None:
        return one_line(f"{origin}: {key}: unknown key{_nearest_key(location)}")
    value = details["input"]
    return one_line(
        f"{origin}: {key or 'recipe'}: expected {fields.describe(node)}, got {shown(value)}{_hint(node, value)}"
    )


def origin_of(location: Location, layers: Sequence[Layer], recipe: str) -> str:
    """The file or override that last wrote the value at `location`; `recipe` for a value that nobody wrote."""
    if not location:
        return recipe
    return next((layer.origin for layer in reversed(layers) if layer.sets(location)), recipe)


def _nearest_key(location: Location) -> str:
    *section, name = location
    node = fields.node_at(section)
    assert node is not None, "pydantic reports unknown keys of known sections only"
    siblings = {fields.dotted((*section, key)): key for key in fields.sub_keys(node)}
    near = difflib.get_close_matches(str(name), siblings.values(), n=1)
    if near:
        return f"; did you mean {fields.dotted((*section, near[0]))}?"
    elsewhere = [fields.dotted(other) for other, _ in fields.walk() if other[-1] == name]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; expected one of {', '.join(siblings.values())}"


def shown(value: object) -> str:
    """A value as an error message says it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = one_line(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _hint(node: fields.Node, value: object) -> str:
    if isinstance(value, str):
        return suggestion(value, fields.choices(node))
    if isinstance(value, float) and value.is_integer() and fields.scalar_type(node) == "integer":
        return f"; write {int(value)}"
    if isinstance(value, int | float) and fields.takes_text(node, shown(value)):
        return f"; write '{shown(value)}' with the quotes"
    return ""
