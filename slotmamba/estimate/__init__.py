"""What a recipe costs before it runs: parameters, floating-point operations, memory."""

from __future__ import annotations

from dataclasses import dataclass

from slotmamba.config.cells import Sweep
from slotmamba.config.schema import Recipe
from slotmamba.estimate.activations import layer_bytes
from slotmamba.estimate.flops import Flops, forward_flops
from slotmamba.estimate.memory import Memory, memory
from slotmamba.estimate.parameters import count_parameters
from slotmamba.estimate.row import RowShape, row_shape
from slotmamba.estimate.sharding import shares
from slotmamba.models.units import weight_units

__all__ = ["Estimate", "estimate", "report", "report_cells"]

BACKWARD = 2  # each matrix product of the forward pass has two of its size in the backward pass


@dataclass(frozen=True)
class Estimate:
    """What `estimate` finds.

    row: shape of a training row; parameters: by part; forward: operations per decoder token by part, where the slot
    memory is in parts again; memory: bytes of one process; gpu: whether that is on a GPU that runs the Triton kernels;
    communication: bytes that it sends in a step, by collective; engine, processes: of the recipe's section parallel;
    tokens_per_step, steps: of the run.
    """

    row: RowShape
    parameters: dict[str, int]
    forward: dict[str, Flops]
    memory: Memory
    gpu: bool
    communication: dict[str, float]
    engine: str
    processes: int
    tokens_per_step: int
    steps: int

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def forward_flops(self) -> float:
        """Operations of the forward pass per decoder token."""
        return sum(part.total for part in self.forward.values())

    @property
    def training_flops(self) -> float:
        """Operations of forward and backward pass per decoder token: three times those of the forward pass."""
        return (1 + BACKWARD) * self.forward_flops

    @property
    def run_flops(self) -> float:
        """Operations of the whole run."""
        return self.training_flops * self.tokens_per_step * self.steps


def estimate(recipe: Recipe) -> Estimate:
    """What a recipe costs. Needs neither the data nor a GPU, and builds no weights."""
    parameters, row = count_parameters(recipe.model), row_shape(recipe)
    share = shares(recipe, weight_units(recipe.model))
    return Estimate(
        row=row,
        parameters=parameters,
        forward=forward_flops(recipe.model, row),
        memory=memory(recipe, sum(parameters.values()), share),
        gpu=layer_bytes(recipe).gpu,
        communication=share.communication,
        engine=recipe.parallel.engine,
        processes=recipe.parallel.size,
        tokens_per_step=recipe.train.global_batch_tokens,
        steps=recipe.train.total_steps,
    )


def report(recipe: Recipe) -> str:
    """`estimate` as text for a terminal."""
    from slotmamba.estimate.text import report_text

    return report_text(recipe.name, estimate(recipe), recipe.train.micro_batch)


def report_cells(sweep: Sweep) -> str:
    """`report` of the cell of a sweep that needs the most memory, and what differs between all cells."""
    from slotmamba.estimate.text import cells_text

    found = {cell.name: estimate(cell.recipe) for cell in sweep.cells}
    largest = max(sweep.cells, key=lambda cell: found[cell.name].memory.training)
    return f"{report(largest.recipe)}\n\n{cells_text(found)}"
