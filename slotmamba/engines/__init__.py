"""What holds the model and steps it: one process, FSDP2, or DeepSpeed ZeRO, behind one interface."""

from __future__ import annotations

from slotmamba.config.schema import Recipe
from slotmamba.engines.engine import Engine
from slotmamba.engines.layout import check_layout
from slotmamba.world import World

__all__ = ["Engine", "build_engine", "check_layout"]


def build_engine(recipe: Recipe, world: World) -> Engine:
    """The engine that the recipe's `parallel.engine` names, with the initial weights of the recipe's seed.

    Raises:
        InputError: the world is not the one that the recipe asks for, or a package is missing.
    """
    check_layout(recipe, world.size)
    engine = _build(recipe, world)
    engine.model.save_memory(recipe.train.activation_checkpointing, recipe.train.sequence_chunks)
    return engine


def _build(recipe: Recipe, world: World) -> Engine:
    match recipe.parallel.engine:
        case "single":
            from slotmamba.engines.single import SingleEngine

            return SingleEngine(recipe, world)
        case "fsdp2":
            from slotmamba.engines.fsdp2 import FSDP2Engine

            return FSDP2Engine(recipe, world)
        case "deepspeed":
            from slotmamba.engines.deepspeed import DeepSpeedEngine

            return DeepSpeedEngine(recipe, world)
