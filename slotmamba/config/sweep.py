"""The section `sweep` of a recipe: values to try for some of its keys. Every combination of them is a cell, a run."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slotmamba.config.errors import Layer, RecipeError, origin_of, shown

MOST_CELLS = 1000  # of one array, where a cluster does not say otherwise (MaxArraySize)
LONGEST_VALUE, LONGEST_NAME = 24, 120  # of a cell's name, which is that of a folder
REFUSED = {
    "name": "cells are named for the values that they try",
    "run_dir": "every cell has a folder of its own in the run_dir of the sweep",
    "slurm": "all cells are one job array, whose jobs ask for the same",
    "sweep": "a cell is a run, not a sweep",
}

Settings = dict[str, Any]
"""What a cell sets: dotted keys and their values."""


def flat_keys(sweep: Any) -> Any:
    """The section with dotted keys alone, `optim.lr` for sections in each other and `data.sources.0` for
    `data.sources[0]`; anything but a section as it is."""
    if not isinstance(sweep, dict):
        return sweep
    flat: dict[str, Any] = {}
    for key, value in sweep.items():
        name = re.sub(r"\[(\d+)\]", r".\1", str(key))
        if isinstance(value, dict):
            flat |= {f"{name}.{below}": values for below, values in flat_keys(value).items()}
        else:
            flat[name] = value
    return flat


def checked_sweep(sweep: Any, layers: Sequence[Layer], recipe: str) -> dict[str, list[Any]] | None:
    """The section without the keys that are null; None where nothing is left.

    Args:
        sweep: the section with dotted keys.
        layers: what the whole recipe was merged from.
        recipe: name of the recipe's own file, for errors.

    Raises:
        RecipeError: one line for each key that cannot be tried, or whose values are no list of different ones.
    """
    if sweep is None:
        return None
    if not isinstance(sweep, dict):
        origin = origin_of(("sweep",), layers, recipe)
        raise RecipeError(f"{origin}: sweep: expected keys with a list of values each, got {shown(sweep)}")
    tried = {key: values for key, values in sweep.items() if values is not None}
    lines = []
    for key, values in tried.items():
        problem = _problem(key, values, list(tried))
        if problem:
            lines.append(f"{origin_of(('sweep', key), layers, recipe)}: sweep.{key}: {problem}")
            continue
        lines += [
            f"{layer.origin}: the sweep sets {key} in every cell; sweep.{key}=null takes it out of the sweep"
            for layer in layers
            if layer.is_override and layer.sets(tuple(int(part) if part.isdigit() else part for part in key.split(".")))
        ]
    count = _count(tried)
    if not lines and count > MOST_CELLS:
        lines.append(f"{recipe}: sweep: {count:,} cells, expected {MOST_CELLS:,} at most")
    if lines:
        raise RecipeError("\n".join(lines))
    return tried or None


def _problem(key: str, values: Any, keys: list[str]) -> str | None:
    reason = REFUSED.get(key.partition(".")[0])
    if reason:
        return f"cannot be tried: {reason}"
    if not isinstance(values, list) or not values:
        return f"expected a list of values to try, got {shown(values)}"
    texts = [_canonical(value) for value in values]
    if len(set(texts)) < len(texts):
        return f"expected different values, got {shown(values)}"
    around = next((other for other in keys if key.startswith(f"{other}.")), None)
    return around and f"expected keys that do not hold one another: sweep.{around} sets it too"


def _count(sweep: Mapping[str, list[Any]]) -> int:
    count = 1
    for values in sweep.values():
        count *= len(values) if isinstance(values, list) else 1
    return count


def combinations(sweep: Mapping[str, list[Any]]) -> Iterator[tuple[str, Settings]]:
    """Name and settings of every cell; the last key changes fastest."""
    texts = {key: _texts(values) for key, values in sweep.items()}
    for numbers in itertools.product(*(range(len(values)) for values in sweep.values())):
        chosen = dict(zip(sweep, numbers, strict=True))
        settings = {key: sweep[key][number] for key, number in chosen.items()}
        yield _name([f"{key}={texts[key][number]}" for key, number in chosen.items()], settings), settings


def _name(parts: list[str], settings: Settings) -> str:
    name = ",".join(parts)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 7]}-{_digest(settings)}"


def _texts(values: list[Any]) -> list[str]:
    """Each value as a part of a file name; a digest tells those apart of which the name does not say all."""
    texts = []
    written = [value if isinstance(value, str) else json.dumps(value) for value in values]
    for value, text in zip(values, written, strict=True):
        is_plain = isinstance(value, int | float | None)
        safe = text if is_plain else re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-.")[:LONGEST_VALUE]
        whole = safe == text and written.count(text) == 1
        texts.append(safe if whole else f"{safe}-{_digest(value)}")
    return texts


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:6]
