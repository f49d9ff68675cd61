"""Whether what a recipe names is there and fits it: looked up without torch, before anything is started."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from slotmamba.config.schema import Recipe
from slotmamba.errors import InputError
from slotmamba_data.files import sha256_hex
from slotmamba_data.manifest import Manifest
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


def unfit_data(recipe: Recipe) -> list[str]:
    """One line for each folder of shards that is there and is not what the recipe takes it for: of another kind or
    form, with tokens that the model has no embedding for, or not of the recipe's tokenizer (of one, without it).

    Manifests say so; training looks at the samples themselves, too.
    """
    lines: list[str] = []
    made_by: dict[str, str] = {}
    with contextlib.suppress(InputError):
        if recipe.data.tokenizer is not None:
            made_by["data.tokenizer"] = sha256_hex(find_tokenizer(recipe.data.tokenizer).read_bytes())
    for key in ("sources", "validation"):
        for number, source in enumerate(getattr(recipe.data, key)):
            if source.shards is None:
                continue
            try:
                manifest = read_manifest(source.shards, remote=recipe.data.remote.settings)
            except InputError:  # it is missing
                continue
            name = f"data.{key}.{number}.shards"
            lines += [f"{name}: {source.shards} {problem}" for problem in _problems(manifest, source.kind, recipe)]
            if manifest.tokenizer is not None:
                made_by[name] = manifest.tokenizer
    if len(set(made_by.values())) > 1:
        lines.append(f"{', '.join(made_by)} are not of one tokenizer: build the shards with data.tokenizer")
    return lines


def _problems(manifest: Manifest, kind: str, recipe: Recipe) -> Iterator[str]:
    if manifest.kind != kind:
        yield f"holds data of kind {manifest.kind}, the source is of kind {kind}"
        return
    model = recipe.model
    if (manifest.form == "seq2seq") != (model.encoder_layers > 0):
        with_encoder = "with" if model.encoder_layers else "without"
        yield f"holds samples of the {manifest.form} form, the model is one {with_encoder} encoder"
    if manifest.vocab_size > model.vocab_size:
        yield f"has tokens up to {manifest.vocab_size - 1}, model.vocab_size is {model.vocab_size}"
