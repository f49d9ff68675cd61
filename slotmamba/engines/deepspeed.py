"""DeepSpeed's ZeRO: optimizer states (stage 1), gradients too (2), or parameters too (3) are spread over all processes.

DeepSpeed's own mixed precision is not used: it makes the parameters bfloat16, gates and addresses with them. To it the
run is float32, and autocast says which operations compute in bfloat16, as in the other engines.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slotmamba.checkpoint.zero import ZeroContents
from slotmamba.config.schema import Recipe
from slotmamba.device import compute_precision
from slotmamba.engines.dtypes import assert_float32
from slotmamba.engines.engine import Engine
from slotmamba.models import SlotMamba, build_model
from slotmamba.models.decoder import DecoderLayer
from slotmamba.models.encoder import EncoderLayer
from slotmamba.models.initial import InitialWeights, deferred
from slotmamba.models.slotmamba import TokenLosses
from slotmamba.models.units import weight_units
from slotmamba.optim import build_optimizer, decayed_parameters
from slotmamba.world import World, ensure_process_group

MOMENTS = ("exp_avg", "exp_avg_sq")


def zero_config(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe."""
    parallel, train = recipe.parallel, recipe.train
    # A layer at a time, as under FSDP: DeepSpeed's default of 500 million gradients in each of two buckets would
    # take 4 GB, however small the model. A bucket is at least as large as any parameter.
    unit = max(sum(map(math.prod, shapes)) for shapes in weight_units(recipe.model).values())
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_bucket_size": unit,
    }
    if parallel.zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = unit
        # Parameters up to this size stay whole in every process. DeepSpeed's default, but less than the matrices of a
        # tiny model.
        zero["stage3_param_persistence_threshold"] = min(100_000, recipe.model.d_model**2 // 2)
    if parallel.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": recipe.rows_per_step,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": recipe.rows_per_step // (parallel.size * train.micro_batch),
        "gradient_clipping": recipe.optim.clip_norm,  # by min(1, clip_norm / (norm + 1e-6)), as torch clips
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 2**31,
    }


class DeepSpeedEngine(Engine):
    """The model under ZeRO, stepped by torch's AdamW.

    ZeRO averages gradients over the processes; the loss is multiplied by their number, which makes that a sum. Its
    overflow check, on in float32 too, drops the gradients of a step whose norm is not finite.
    """

    optimizer: Any
    """DeepSpeed's, which wraps torch's AdamW."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        deepspeed = import_quietly(world)
        ensure_process_group(world)
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed asks for it without a launcher too
        deepspeed.init_distributed(verbose=False)  # takes the process group that is there
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.world = world
        self._stage = recipe.parallel.zero_stage
        self._checked = False
        config = zero_config(recipe)
        if world.is_main:
            print(f"deepspeed: {json.dumps(config)}", flush=True)
        with torch.device("meta"):
            skeleton = build_model(recipe.model)
        weights = InitialWeights(skeleton, recipe.seed)
        self.parameters = weights.numel
        self.model = _sharded(recipe, config, weights) if self._stage == 3 else _whole(recipe, world, weights)
        optimizer = build_optimizer(self.model, recipe.optim, decayed_parameters(skeleton))
        self.zero, self.optimizer, _, _ = deepspeed.initialize(
            model=_Losses(self.model, partial(compute_precision, world.device, recipe.train.precision)),
            optimizer=optimizer,
            config=config,
            dist_init_required=False,
        )
        # Whoever validates calls the model's own losses; in stage 3 hooks around the wrapper gather the weights.
        self.model.losses = self._forward  # type: ignore[assignment,method-assign]

    def losses(self, **arguments: Tensor) -> TokenLosses:
        return self._forward(**arguments)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.zero.set_gradient_accumulation_boundary(last)
        # A loss that is not finite makes every gradient NaN, so that DeepSpeed drops them all.
        factor = torch.where(loss.detach().isfinite(), self.world.size, math.nan)
        self.zero.backward(loss * factor, scale_wrt_gas=False)

    def gradient_norm(self) -> Tensor:
        groups = self.optimizer._get_norm_groups() if self._stage == 3 else [self.optimizer.scaled_global_norm()]
        norms = torch.stack([torch.as_tensor(norm, device=self.world.device) for norm in groups])
        # DeepSpeed's norm of gradients that are not finite is -1.
        return torch.where(norms < 0, math.nan, norms).norm()

    def step(self, lr: float, norm: Tensor) -> None:
        """DeepSpeed clips, by torch's formula and a norm that it computes again, the same one."""
        if not self._checked:
            assert_float32("parameters", dict(self.model.named_parameters()))
            assert_float32("gradients", self._gradients())
        for group in self.optimizer.optimizer.param_groups:
            group["lr"] = lr
        self.zero.step()
        assert self.zero.was_step_applied(), "DeepSpeed has dropped a step whose loss and gradients are finite"
        if not self._checked:
            assert_float32("optimizer states", self._states())
            self._checked = True

    def discard(self) -> None:
        self.zero.step()
        assert not self.zero.was_step_applied(), "DeepSpeed has made a step whose loss or gradients are not finite"

    def contents(self) -> ZeroContents:
        return ZeroContents(self)

    def tensors(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        states = self.optimizer.optimizer.state
        steps = {int(state["step"]) for state in states.values() if "step" in state}
        assert len(steps) <= 1
        if self._stage < 3 and steps:
            # DeepSpeed links them to the parameters after the first step of the first group of parameters, when those
            # of the others are not there yet, and not again when it has loaded others.
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()
        gathered: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            made: dict[str, Callable[[], Tensor]] = {f"model.{name}": partial(safe_get_full_fp32_param, parameter)}
            for key in MOMENTS if steps else ():
                made[f"optimizer.{name}.{key}"] = partial(safe_get_full_optimizer_state, parameter, key)
            for step in steps:
                made[f"optimizer.{name}.step"] = partial(torch.tensor, float(step))
            gathered |= {full: make() for full, make in made.items() if names is None or full in names}
        return gathered

    def _forward(self, **arguments: Tensor) -> TokenLosses:
        return TokenLosses(*self.zero(**arguments))

    def _gradients(self) -> dict[str, Tensor | None]:
        """What this process holds of the gradients after the last backward."""
        if self.recipe.parallel.cpu_offload:
            optimizer = self.optimizer
            flat = (
                optimizer.fp32_partitioned_groups_flat
                if self._stage == 3
                else optimizer.single_partition_of_fp32_groups
            )
            return {f"group {number}": partition.grad for number, partition in enumerate(flat)}
        return {
            f"group {number}, part {part}": gradient
            for number, gradients in self.optimizer.averaged_gradients.items()
            for part, gradient in enumerate(gradients or [])
        }

    def _states(self) -> dict[str, Tensor]:
        """What this process holds of the optimizer states."""
        states = self.optimizer.optimizer.state.values()
        return {f"group {number}, {key}": state[key] for number, state in enumerate(states) for key in state}


class _Losses(nn.Module):
    """What DeepSpeed wraps: its hooks run around `forward` and look for tensors in tuples.

    The model is its only child, under the name that checkpoints give it too. precision: what the model computes in. It
    is entered here because on GPUs DeepSpeed switches off an autocast that it finds around its forward.
    """

    def __init__(self, model: SlotMamba, precision: Callable[[], AbstractContextManager[object]]) -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, **arguments: Tensor) -> tuple[Tensor, ...]:
        with self.precision():
            losses = type(self.model).losses(self.model, **arguments)  # type: ignore[arg-type]
        return tuple(getattr(losses, field.name) for field in fields(losses))


def _whole(recipe: Recipe, world: World, weights: InitialWeights) -> SlotMamba:
    with deferred():
        model = build_model(recipe.model)
    weights.fill(model)
    return model.to(world.device)


def _sharded(recipe: Recipe, config: dict[str, Any], weights: InitialWeights) -> SlotMamba:
    """Parameters are shards as soon as their module is built; each is gathered once to get its values."""
    import deepspeed

    # float32 by the configuration: where there is no float16 its argument `dtype` makes them bfloat16, whatever it is.
    with deepspeed.zero.Init(config_dict_or_path=config, mem_efficient_linear=False), deferred():
        model = build_model(recipe.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Gathered from all, and on leaving the context spread again from process 0.
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                if torch.distributed.get_rank() == 0:
                    parameter.copy_(weights.values(name))
    # A layer is gathered as a whole, as under FSDP: its slot memories reach the next layer in objects that DeepSpeed's
    # hooks do not look into, so hooks around the modules in it would miss part of the backward pass.
    deepspeed.utils.set_z3_leaf_modules(model, [DecoderLayer, EncoderLayer][: 1 + (recipe.model.encoder_layers > 0)])
    return model


def import_quietly(world: World) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)  # else it looks for one, and warns that it found none
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls torch's collectives by names that newer versions of torch warn of.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # On a CPU it would compile a shared-memory backend with g++ at every first start, half a minute, or fail without.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    return deepspeed
