"""Where weights, gradients and optimizer states are, by engine: bytes of one process, and what it sends in a step.

All of it is float32, and of the processes the first is meant, which never holds less than another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from slotmamba.config.schema import Recipe
from slotmamba.engines.deepspeed import zero_config
from slotmamba.models.units import Shape

FLOAT = 4
MOMENTS = 2  # AdamW's

MAX_LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's default


@dataclass(frozen=True)
class Shares:
    """Bytes of one process.

    parameters, gradients, optimizer: its part, kept all the time, on the device; gathered: whole parameters and
    gradients beside it while their layers run, and buffers for them; host: what offloading keeps in CPU memory instead;
    communication: what the process sends in a step, by collective.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    host: int
    communication: dict[str, float]


def shares(recipe: Recipe, units: Mapping[str, list[Shape]]) -> Shares:
    """What one process holds of parameters that have these shapes, by unit (`weight_units`)."""
    whole = FLOAT * sum(_numel(shapes) for shapes in units.values())
    match recipe.parallel.engine:
        case "single":
            return Shares(whole, whole, MOMENTS * whole, gathered=0, host=0, communication={})
        case "fsdp2":
            return _fsdp2(recipe, units)
        case "deepspeed":
            return _zero(recipe, units)


def micro_batches(recipe: Recipe) -> int:
    """Forward passes of a process in a step."""
    return recipe.rows_per_step // (recipe.parallel.size * recipe.train.micro_batch)


def _fsdp2(recipe: Recipe, units: Mapping[str, list[Shape]]) -> Shares:
    """A block is gathered for its forward and its backward pass, together with the next one, out of a buffer of its
    size; the rest, the root, once for both passes. Gradients are whole until they have been reduced: a block's and the
    root's at a time; with several micro-batches, whose sum is reduced once, all of them."""
    parallel, accumulation = recipe.parallel, micro_batches(recipe)
    padded = {name: FLOAT * _padded(shapes, parallel.shard) for name, shapes in units.items()}
    root = padded.pop("")
    block = max(padded.values())
    every = root + sum(padded.values())
    share = every // parallel.shard
    summed = every if accumulation > 1 else root + block
    reduced = max(root, block)
    states = share * (2 + MOMENTS)
    offload = parallel.cpu_offload
    return Shares(
        parameters=0 if offload else share,
        gradients=0 if offload else share,
        optimizer=0 if offload else MOMENTS * share,
        gathered=root + 3 * block + summed + reduced if parallel.shard > 1 else 0,
        host=states if offload else 0,
        communication=_named(
            {
                "all-gather of parameters": _ring(parallel.shard) * accumulation * (2 * (every - root) + root),
                "reduce-scatter of gradients": _ring(parallel.shard) * every,
                "all-reduce of gradients over replicas": 2 * _ring(parallel.replicate) * share,
            }
        ),
    )


def _named(bytes_sent: dict[str, float]) -> dict[str, float]:
    return {name: number for name, number in bytes_sent.items() if number}


def _ring(size: int) -> float:
    """What each process of a ring sends of data that are gathered, or summed and scattered, over it."""
    return (size - 1) / size


def _numel(shapes: Iterable[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _padded(shapes: Iterable[Shape], shards: int) -> int:
    """Numbers of all shards together: the first axis is cut into equal parts, the last ones filled up."""
    return sum(shards * math.ceil(shape[0] / shards) * math.prod(shape[1:]) for shape in shapes)


def _zero(recipe: Recipe, units: Mapping[str, list[Shape]]) -> Shares:
    """ZeRO keeps a copy of its share of the weights beside the moments, and two buckets of gradients to be reduced,
    once a step in stage 1, after every micro-batch in stages 2 and 3: one is filled while the other is reduced, or in
    stage 3 copied in the order of shards. Stage 3 keeps what it has gathered, up to a number of parameters, while it is
    to be used again soon; where that is all of them it gathers less often than this says.
    """
    parallel, accumulation = recipe.parallel, micro_batches(recipe)
    stage, ring = parallel.zero_stage, _ring(parallel.shard)
    bucket = zero_config(recipe)["zero_optimization"]["reduce_bucket_size"]
    numbers = sum(_numel(shapes) for shapes in units.values())
    whole, share = FLOAT * numbers, FLOAT * math.ceil(numbers / parallel.shard)
    live = FLOAT * min(numbers, MAX_LIVE_PARAMETERS) if stage == 3 else 0
    states = (MOMENTS + 1) * share
    return Shares(
        parameters=share if stage == 3 else whole,
        gradients=whole if stage == 1 else share,
        optimizer=0 if parallel.cpu_offload else states,
        gathered=live + 2 * FLOAT * bucket,
        host=states if parallel.cpu_offload else 0,
        communication=_named(
            {
                "all-gather of parameters": ring * whole * (2 * accumulation if stage == 3 else 1),
                "reduce-scatter of gradients": ring * whole * (accumulation if stage > 1 else 1),
            }
        ),
    )
