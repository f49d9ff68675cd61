"""Recipe files: find, extend, override, validate, save.

OmegaConf reads, merges and interpolates (sections merge, lists and values are replaced), pydantic validates the result.
Relative paths of data and runs inside a recipe are relative to the current working directory, wherever the file lies.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from slotmamba.config.errors import Layer, Location, RecipeError, explain, origin_of
from slotmamba.config.fields import default_values, dotted
from slotmamba.config.schema import Recipe
from slotmamba.config.sweep import checked_sweep, flat_keys
from slotmamba.errors import one_line, suggestion
from slotmamba.files import write_text
from slotmamba.installed import data_path

KEY = re.compile(r"[A-Za-z_]\w*(\.\w+|\[\d+\])*")
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Setting:
    """An override that is not text; `origin` is for errors."""

    key: str
    value: Any
    origin: str


def installed_recipes() -> dict[str, Path]:
    """The recipes that come with SlotMamba, by name, sorted."""
    return {path.stem: path for path in sorted(data_path("recipes").glob("*.yaml"))}


def load_recipe(recipe: str | Path, overrides: Sequence[str | Setting] = ()) -> Recipe:
    """Load a recipe and everything it extends, apply overrides, and validate the result.

    Args:
        recipe: path of a YAML file, or the name of an installed recipe.
        overrides: ``a.b.c=value`` each, applied in order; entries of a list by number, ``data.sources.0.shards=...`` or
            ``data.sources[0].shards=...``. Values are YAML.

    Raises:
        RecipeError: one line for each thing that is wrong with the recipe or the overrides.
    """
    content, layers, origin = _resolved(recipe, overrides)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise explain(error, layers, origin) from None


def recipe_content(recipe: str | Path, overrides: Sequence[str | Setting] = ()) -> dict[Any, Any]:
    """What `load_recipe` validates: every key of a recipe in nested dictionaries, whatever its value.

    Raises:
        RecipeError: the files or the overrides cannot be read.
    """
    return _resolved(recipe, overrides)[0]


def _resolved(recipe: str | Path, overrides: Sequence[str | Setting]) -> tuple[dict[Any, Any], list[Layer], str]:
    """The merged content, where it comes from, and the name of the recipe's own file."""
    path = _find(str(recipe), Path(), asked_by="")
    origin = _shown_path(path)
    layers = _read_chain(path)
    # The defaults are there so that ${...} finds every key.
    config = OmegaConf.merge(default_values(), *(OmegaConf.create(layer.content) for layer in layers))
    assert isinstance(config, DictConfig)
    for override in overrides:
        layers.append(_apply(override, config))
    try:
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        assert error.full_key, "a value can only be wrong at a key"
        location = _location(error.full_key)
        raise RecipeError(f"{origin_of(location, layers, origin)}: {dotted(location)}: {_first_line(error)}") from None
    assert isinstance(content, dict)
    content["sweep"] = checked_sweep(content["sweep"], layers, origin)
    return content, layers, origin


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write every key of `recipe` as YAML that `load_recipe` reads back equal; the file appears whole or not at all."""
    write_text(Path(path), recipe_yaml(recipe))


def recipe_yaml(recipe: Recipe) -> str:
    """Every key of `recipe` as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(escaped(recipe.model_dump(mode="json"))))


def escaped(value: Any) -> Any:
    """Keep OmegaConf from reading ``${`` in a resolved string as an interpolation."""
    if isinstance(value, dict):
        return {key: escaped(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [escaped(entry) for entry in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _find(name: str, folder: Path, asked_by: str) -> Path:
    """The file that `name` means: a path relative to `folder`, else an installed recipe, with or without its suffix."""
    path = folder / name
    if path.is_file():
        return path
    installed = installed_recipes()
    stem = name.removesuffix(".yaml")
    if stem in installed:
        return installed[stem]
    if path.is_dir():
        raise RecipeError(f"{asked_by}{name}: expected a YAML file, this is a folder")
    neighbours = [entry.name for entry in path.parent.glob("*") if entry.suffix in SUFFIXES]
    near = suggestion(path.name, neighbours) or suggestion(stem, installed)
    have = ", ".join(installed) if installed else "none"
    raise RecipeError(f"{asked_by}{name}: no such file or installed recipe{near or f' (installed: {have})'}")


def _read_chain(path: Path) -> list[Layer]:
    """The recipe at `path` and all that it extends, the most basic first."""
    layers: list[Layer] = []
    chain: list[Path] = []
    while True:
        if path.resolve() in chain:
            names = " -> ".join(_shown_path(step) for step in [*chain, path])
            raise RecipeError(f"{_shown_path(path)}: extends: the recipes extend each other in a circle: {names}")
        chain.append(path.resolve())
        content = _read(path)
        origin = _shown_path(path)
        base = content.pop("extends", None)
        layers.insert(0, Layer(origin, content))
        if base is None:
            return layers
        if not isinstance(base, str):
            raise RecipeError(f"{origin}: extends: expected a file or the name of an installed recipe, got {base!r}")
        path = _find(base, path.parent, asked_by=f"{origin}: extends: ")


def _read(path: Path) -> dict[Any, Any]:
    origin = _shown_path(path)
    try:
        text = path.read_text(encoding="utf-8")
        top = yaml.compose(text, Loader=yaml.SafeLoader)
        if top is None:
            raise RecipeError(f"{origin}: the file is empty, expected the keys of a recipe")
        if not isinstance(top, yaml.MappingNode):
            found = "a list" if isinstance(top, yaml.SequenceNode) else "a single value"
            raise RecipeError(f"{origin}: expected the keys of a recipe at the top, got {found}")
        content = OmegaConf.to_container(OmegaConf.create(text))
    except PermissionError as error:
        raise RecipeError(f"{origin}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{origin}{line}: not valid YAML: {one_line(error.problem)}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{origin}: not valid YAML: {one_line(error)}") from None
    except OmegaConfBaseException as error:
        raise RecipeError(f"{origin}: {_first_line(error)}") from None
    assert isinstance(content, dict)
    if "sweep" in content:
        content["sweep"] = flat_keys(content["sweep"])
    return content


def _apply(override: str | Setting, config: DictConfig) -> Layer:
    """Apply one ``key=value`` to `config` in place."""
    setting = override if isinstance(override, Setting) else _parsed(override)
    key, value, origin = setting.key, setting.value, setting.origin
    if key.startswith("sweep."):  # the keys of that section have dots in them
        key, value = "sweep", flat_keys({key.removeprefix("sweep."): value})
    try:
        OmegaConf.update(config, key, value)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{origin}: {_first_line(error)}") from None
    except (TypeError, ValueError):  # OmegaConf expects an integer below a list
        raise RecipeError(f"{origin}: expected the number of a list's entry, as in data.sources.0.shards") from None
    content: Any = value
    for part in reversed(_location(key)):
        content = {part: content}
    return Layer(origin, content, is_override=True)


def _parsed(override: str) -> Setting:
    key, equals, text = override.partition("=")
    origin = f"override {override}"
    if not equals:
        raise RecipeError(f"{origin}: expected key=value, such as optim.lr=3e-4")
    if not KEY.fullmatch(key):
        raise RecipeError(f"{origin}: expected a key such as optim.lr or data.sources.0.shards, got {key!r}")
    try:
        value = _parse_value(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: not valid YAML: {one_line(getattr(error, 'problem', error))}") from None
    except OmegaConfBaseException as error:
        raise RecipeError(f"{origin}: {_first_line(error)}") from None
    return Setting(key, flat_keys(value) if key == "sweep" else value, origin)


def _parse_value(text: str) -> Any:
    """Read the right side of an override as OmegaConf reads a value in a file (1e-3 is a number)."""
    content = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    assert isinstance(content, dict)
    return content["value"]


def _location(key: str) -> Location:
    """``data.sources[0].shards`` or ``data.sources.0.shards`` in parts."""
    return tuple(int(part) if part.isdigit() else part for part in re.findall(r"\w+", key))


def _first_line(error: Exception) -> str:
    """OmegaConf's message without the type details it adds below."""
    return str(error).splitlines()[0]


def _shown_path(path: Path) -> str:
    """`path` relative to the working directory where it lies below it."""
    resolved = path.resolve()
    return str(resolved.relative_to(Path.cwd())) if resolved.is_relative_to(Path.cwd()) else str(resolved)
