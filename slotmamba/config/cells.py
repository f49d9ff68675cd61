"""The runs of a sweep: each a recipe of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from slotmamba.config.errors import RecipeError
from slotmamba.config.loading import Setting, escaped, load_recipe
from slotmamba.config.schema import Recipe
from slotmamba.config.sweep import Settings, combinations


@dataclass(frozen=True)
class Cell:
    """`name` is its folder in that of the sweep; `recipe` holds no sweep."""

    name: str
    settings: Settings
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """`recipe` as it was written, `cells` in a stable order, one at least; all ask for the same processes."""

    recipe: Recipe
    cells: tuple[Cell, ...]


def load_sweep(recipe: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Loads a recipe with a sweep, and every cell of it as `load_recipe` does.

    Raises:
        RecipeError: as `load_recipe`; one line for each thing that is wrong with cells, which names the first of them.
    """
    base = load_recipe(recipe, overrides)
    assert base.sweep is not None
    cells: list[Cell] = []
    problems: dict[str, str] = {}  # and the first line that says so
    for name, settings in combinations(base.sweep):
        origin = f"cell {name}"
        set_by_cell = [Setting(key, escaped(value), origin) for key, value in {"sweep": None, **settings}.items()]
        try:
            found = load_recipe(recipe, [*overrides, *set_by_cell])
        except RecipeError as error:
            for line in str(error).splitlines():
                problems.setdefault(line.removeprefix(f"{origin}: "), origin)
            continue
        own = {"name": f"{base.name}:{name}", "run_dir": base.run_path / name}
        cells.append(Cell(name, settings, found.model_copy(update=own)))
    if not problems:
        problems = dict(_different_jobs(cells))
    if problems:
        raise RecipeError("\n".join(f"{origin}: {problem}" for problem, origin in problems.items()))
    return Sweep(base, tuple(cells))


def _different_jobs(cells: Sequence[Cell]) -> Iterator[tuple[str, str]]:
    """What asks for another job than the first cell, and where."""
    first = cells[0]
    for cell in cells[1:]:
        sizes = [each.recipe.parallel.size for each in (cell, first)]
        if sizes[0] != sizes[1]:
            yield (
                f"parallel.replicate * parallel.shard = {sizes[0]} processes, not {sizes[1]} as in cell {first.name}: "
                "all cells are one job array, whose jobs ask for the same",
                f"cell {cell.name}",
            )
        if cell.recipe.slurm != first.recipe.slurm:
            yield f"its section slurm is not that of cell {first.name}", f"cell {cell.name}"
