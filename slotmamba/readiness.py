"""Whether what a recipe names is there: looked up without torch, before anything is started."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from slotmamba.config.schema import Recipe
from slotmamba.errors import InputError
from slotmamba_data.store import read_manifest
from slotmamba_data.tokenizer_file import find_tokenizer


def missing_data(recipe: Recipe) -> list[str]:
    """One line for each tokenizer or folder of shards that the recipe names and that is not there, complete.

    Whether a folder holds what was written only reading it can tell.
    """
    named: list[tuple[str, str | None, Callable[[str], object]]] = [
        ("data.tokenizer", recipe.data.tokenizer, find_tokenizer)
    ]
    manifest = partial(read_manifest, remote=recipe.data.remote.settings)
    for key in ("sources", "validation"):
        for number, source in enumerate(getattr(recipe.data, key)):
            named.append((f"data.{key}.{number}.shards", source.shards, manifest))
    lines = []
    for key, path, find in named:
        try:
            if path is not None:
                find(path)
        except InputError as error:
            lines.append(f"{key}: {error}")
    return lines
