"""docs/sizes.md: what the recipes for many GPUs cost, as `slotmamba estimate` says it.

python -m slotmamba.estimate.sizes > docs/sizes.md
"""

from __future__ import annotations

import sys

from slotmamba.config import Recipe, installed_recipes, load_recipe
from slotmamba.estimate import Estimate, estimate
from slotmamba.estimate.text import readable, report_text

TITLE = """# Recipes for many GPUs

What `slotmamba estimate RECIPE` says of them, for GPUs that run the Triton kernels (made by `make docs`).
`slotmamba train RECIPE --dry-run` builds and shards such a model for all its processes on one CPU, and
`slotmamba submit RECIPE` starts it (see [slurm.md](slurm.md)). All lm recipes read `data/corpus`; the comment on top
of lm-130m says how it is made. Their learning rates and token counts are common ones for models of their size, not the
result of a search.
"""
COLUMNS = (
    "recipe",
    "parameters",
    "processes",
    "engine",
    "tokens a step",
    "steps",
    "FLOPs",
    "rows at once",
    "memory of a process",
    "sent in a step",
)


def sizes_page() -> str:
    """The page in Markdown: a row for each installed recipe of more than one process, then the reports in full."""
    recipes = [load_recipe(name) for name in installed_recipes()]
    found = [(recipe, estimate(recipe)) for recipe in recipes if recipe.parallel.size > 1]
    found.sort(key=lambda pair: (pair[0].model.encoder_layers > 0, pair[1].total_parameters))
    lines = [TITLE, _row(*COLUMNS), _row(*["---"] * len(COLUMNS))]
    lines += [_row(*_cells(recipe, costs)) for recipe, costs in found]
    for recipe, costs in found:
        lines += ["", f"## {recipe.name}", "", "```", report_text(recipe.name, costs, recipe.train.micro_batch), "```"]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(recipe: Recipe, costs: Estimate) -> tuple[str, ...]:
    parallel = recipe.parallel
    engine = f"ZeRO-{parallel.zero_stage}" if parallel.engine == "deepspeed" else parallel.engine
    if parallel.replicate > 1:
        engine = f"{engine}, {parallel.replicate} x {parallel.shard}"
    return (
        f"`{recipe.name}`",
        f"{costs.total_parameters / 1e6:,.0f} M",
        str(costs.processes),
        engine,
        f"{costs.tokens_per_step:,}",
        f"{costs.steps:,}",
        f"{costs.run_flops:.2g}",
        str(recipe.train.micro_batch),
        readable(costs.memory.training),
        readable(sum(costs.communication.values())),
    )


if __name__ == "__main__":
    sys.stdout.write(sizes_page())
