"""FSDP2 and HSDP: parameters, gradients and optimizer states are shards; a block's are gathered while it runs."""

from __future__ import annotations

import itertools
import warnings

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from slotmamba.config.schema import ParallelConfig, Recipe
from slotmamba.engines.single import SingleEngine
from slotmamba.models import SlotMamba, build_model
from slotmamba.models.initial import InitialWeights
from slotmamba.optim import decayed_parameters
from slotmamba.world import World, ensure_process_group


class FSDP2Engine(SingleEngine):
    """The model starts on the meta device, is sharded there, and every process fills its own shards: none ever holds
    more than one whole parameter.

    Gradients are summed, not averaged: the loss of each process is divided by the count of the whole global batch.
    """

    engine = "fsdp2"

    def _prepare(self, recipe: Recipe, world: World) -> tuple[SlotMamba, set[str]]:
        ensure_process_group(world)
        with torch.device("meta"):
            model = build_model(recipe.model)
        weights = InitialWeights(model, recipe.seed)
        decayed = decayed_parameters(model)  # before sharding, which makes new parameters
        self.sharded = shard_model(model, recipe.parallel, world.device)
        # With offloading the shards live in CPU memory, and FSDP moves them.
        model.to_empty(device="cpu" if recipe.parallel.cpu_offload else world.device)
        _fill_shards(model, weights)
        return model, decayed

    def backward(self, loss: Tensor, last: bool) -> None:
        self.sharded.set_requires_gradient_sync(last)
        self.sharded.set_is_last_backward(last)
        loss.backward()

    def gradient_norm(self) -> Tensor:
        norm = super().gradient_norm()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def shard_model(model: SlotMamba, parallel: ParallelConfig, device: torch.device) -> FSDPModule:
    mesh = _mesh(parallel, device)
    # Parameters are gathered and gradients reduced in float32. Which of a block's operations compute in bfloat16 is for
    # autocast to say, as in the other engines: casting a block's parameters would cast its gates and addresses too.
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if parallel.cpu_offload else OffloadPolicy()
    blocks = _blocks(model)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=offload)
    # What is left, the embedding (tied or not), the output matrix and the last norms, stays gathered in between.
    sharded = fully_shard(model, mesh=mesh, mp_policy=precision, offload_policy=offload)
    for block, following in itertools.pairwise(blocks):
        assert isinstance(block, FSDPModule) and isinstance(following, FSDPModule)
        block.set_modules_to_forward_prefetch([following])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo cannot scale while it sums, and NCCL need not.
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "losses")
    # A layer's slot memories are views. Nothing changes them in place, which is what torch warns of.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    return sharded


def _mesh(parallel: ParallelConfig, device: torch.device) -> DeviceMesh:
    """Groups of `shard` neighbouring processes hold the model together; with several groups this is HSDP."""
    if parallel.replicate == 1:
        return init_device_mesh(device.type, (parallel.shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (parallel.replicate, parallel.shard), mesh_dim_names=("replicate", "shard"))


def _blocks(model: SlotMamba) -> list[nn.Module]:
    """The layers in the order in which they run."""
    stacks = [model.get_submodule(name) for name in ("encoder", "decoder") if hasattr(model, name)]
    return [layer for stack in stacks for layer in stack.get_submodule("layers").children()]


def _fill_shards(model: nn.Module, weights: InitialWeights) -> None:
    """Gives every process's shards exactly the values that the whole parameters would have."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            mesh, local = parameter.device_mesh, parameter.to_local()
            parts = weights.values(name).chunk(mesh["shard"].size(), dim=0)
            part = mesh["shard"].get_local_rank()
            if part < len(parts):
                local.copy_(parts[part])
