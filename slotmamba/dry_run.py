"""What a recipe would be on all its processes, seen from one: the sharded model without weights, nothing run.

The other processes are torch's fake ones: their collectives return at once and send nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from slotmamba.config.schema import ParallelConfig, Recipe
from slotmamba.engines import check_layout
from slotmamba.errors import InputError
from slotmamba.estimate import Estimate, estimate
from slotmamba.estimate.sharding import FLOAT, MOMENTS, micro_batches
from slotmamba.estimate.text import communication_tables, readable
from slotmamba.models import SlotMamba, build_model
from slotmamba.optim import build_optimizer, decayed_parameters
from slotmamba.readiness import missing_data
from slotmamba.tables import table
from slotmamba.world import World

MOST_PROCESSES = 65_536
MOST_SHARDS = 4_096  # of fsdp2, which makes a tensor for every shard of every parameter


@dataclass(frozen=True)
class Part:
    """What one process holds, in float32 numbers; `uneven` parameters do not divide into equal shards."""

    parameters: int
    gradients: int
    optimizer: int
    uneven: int


def dry_run(recipe: Recipe) -> str:
    """Builds and shards the model as the processes of the recipe's world would; returns a report.

    Raises:
        InputError: the recipe does not fit its world, or that is too large for a dry run: more than MOST_PROCESSES, or
            MOST_SHARDS under fsdp2, which take half a minute and 1 GB.
        ModuleNotFoundError: the engine's package is not installed.
    """
    size = recipe.parallel.size
    check_layout(recipe, size)
    _check_size(recipe.parallel)
    parts = {rank: _part(recipe, rank) for rank in sorted({0, size - 1})}
    found = estimate(recipe)
    rows, passes = recipe.rows_per_step // size, micro_batches(recipe)
    head = [
        f"{recipe.name}: dry run of {_engine(recipe)}; nothing is trained",
        f"a step has {recipe.rows_per_step:,} rows of {recipe.data.seq_len:,} tokens: {rows:,} on each process, "
        f"in {passes:,} passes of {recipe.train.micro_batch:,}",
        f"{parts[0].uneven} parameters do not divide into equal shards; {_waste(recipe, parts[0], found)} is padding",
        *(f"to be made before training: {line}" for line in missing_data(recipe)),
    ]
    return "\n\n".join(["\n".join(head), _parts(parts), _memory(parts[0], found), *communication_tables(found)])


def _check_size(parallel: ParallelConfig) -> None:
    if parallel.size > MOST_PROCESSES:
        raise InputError(
            f"a dry run is for at most {MOST_PROCESSES} processes, not parallel.replicate * parallel.shard = "
            f"{parallel.size}"
        )
    if parallel.engine == "fsdp2" and parallel.shard > MOST_SHARDS:
        raise InputError(
            f"a dry run of fsdp2 is for at most {MOST_SHARDS} shards, not parallel.shard={parallel.shard}: "
            "raise parallel.replicate instead"
        )


def _engine(recipe: Recipe) -> str:
    parallel = recipe.parallel
    match parallel.engine:
        case "single":
            return "one process"
        case "fsdp2":
            replicas = f" with {parallel.replicate} replicas (HSDP)" if parallel.replicate > 1 else ""
            return f"fsdp2 on {parallel.size} processes{replicas}"
        case "deepspeed":
            return f"deepspeed ZeRO-{parallel.zero_stage} on {parallel.size} processes"


def _part(recipe: Recipe, rank: int) -> Part:
    with torch.device("meta"):
        model = build_model(recipe.model)
    match recipe.parallel.engine:
        case "single":
            count = sum(parameter.numel() for parameter in model.parameters())
            return Part(count, count, MOMENTS * count, uneven=0)
        case "fsdp2":
            return _fsdp2_part(recipe, model, rank)
        case "deepspeed":
            return _zero_part(recipe, model)


@contextmanager
def _fake_processes(rank: int, size: int) -> Iterator[None]:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _fsdp2_part(recipe: Recipe, model: SlotMamba, rank: int) -> Part:
    from torch.distributed.tensor import DTensor

    from slotmamba.engines.fsdp2 import shard_model

    shards = recipe.parallel.shard
    uneven = sum(parameter.shape[0] % shards > 0 for parameter in model.parameters())
    decayed = decayed_parameters(model)
    with _fake_processes(rank, recipe.parallel.size):
        shard_model(model, recipe.parallel, torch.device("cpu"))
        local = []
        for group in build_optimizer(model, recipe.optim, decayed).param_groups:
            for parameter in group["params"]:
                assert isinstance(parameter, DTensor)
                local.append(parameter.to_local().numel())
    return Part(sum(local), sum(local), MOMENTS * sum(local), uneven)


def _zero_part(recipe: Recipe, model: SlotMamba) -> Part:
    """ZeRO cannot be built without memory: its configuration is checked, and its shares are counted. Stage 3 cuts every
    parameter, the others each of AdamW's groups laid end to end, with shares of an even length."""
    from slotmamba.engines.deepspeed import import_quietly, zero_config

    deepspeed = import_quietly(World.alone(torch.device("cpu")))
    deepspeed.runtime.zero.config.DeepSpeedZeroConfig(**zero_config(recipe)["zero_optimization"])
    parallel = recipe.parallel
    sizes = [parameter.numel() for parameter in model.parameters()]
    whole = sum(sizes)
    if parallel.zero_stage == 3:
        share = sum(-(-size // parallel.shard) for size in sizes)
        uneven = sum(size % parallel.shard > 0 for size in sizes)
    else:
        groups = build_optimizer(model, recipe.optim, decayed_parameters(model)).param_groups
        lengths = [sum(parameter.numel() for parameter in group["params"]) for group in groups]
        share = sum(2 * -(-length // (2 * parallel.shard)) for length in lengths)
        uneven = 0
    return Part(
        parameters=share if parallel.zero_stage == 3 else whole,
        gradients=whole if parallel.zero_stage == 1 else share,
        optimizer=(MOMENTS + 1) * share,
        uneven=uneven,
    )


def _waste(recipe: Recipe, part: Part, found: Estimate) -> str:
    """How much more the first process holds than its even share, of the optimizer's states."""
    states = MOMENTS + (recipe.parallel.engine == "deepspeed")
    return f"{part.optimizer * recipe.parallel.shard / (states * found.total_parameters) - 1:.2%}"


def _parts(parts: dict[int, Part]) -> str:
    header = ("numbers held by a process", *(f"rank {rank}" for rank in parts))
    names = {"parameters": "parameters", "gradients": "gradients", "optimizer": "optimizer states"}
    return table(
        header, [(title, *(f"{getattr(part, name):,}" for part in parts.values())) for name, title in names.items()]
    )


def _memory(part: Part, found: Estimate) -> str:
    """What was built beside the estimate, in bytes; what no model without memory can show is the estimate's alone."""
    memory = found.memory
    rows = [
        ("parameters", FLOAT * part.parameters, memory.parameters),
        ("gradients", FLOAT * part.gradients, memory.gradients),
        ("optimizer states", FLOAT * part.optimizer, memory.optimizer),
    ]
    lines = [(name, readable(built), readable(there)) for name, built, there in rows if there]
    if memory.host:
        offloaded = sum(built for _, built, there in rows if not there)
        lines.append(("offloaded to CPU memory", readable(offloaded), readable(memory.host)))
    only = {
        "gathered while layers run, and buffers": memory.gathered,
        "weights in bfloat16 (autocast)": memory.autocast,
        "activations of a micro-batch": sum(memory.activations.values()),
        "slot states at segment ends": memory.boundary_states,
        "training, total on the device": memory.training,
    }
    lines += [(name, "", readable(number)) for name, number in only.items() if number]
    return table(("bytes of rank 0", "as built", "estimate"), lines)
