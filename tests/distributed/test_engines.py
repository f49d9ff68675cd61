"""What every engine promises beside the losses: initial weights, gradients, dtypes, skipped steps, tensors by name."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from slotmamba.config import Recipe
from slotmamba.device import compute_precision
from slotmamba.engines import Engine, build_engine
from slotmamba.models.slotmamba import TokenLosses
from slotmamba.optim import decayed_parameters
from slotmamba.world import World
from tests.distributed.tiny import SEQ2SEQ, SINGLE, fsdp2, steps, tiny, zero
from tests.distributed.worlds import run_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CPU = torch.device("cpu")
ALONE = World.alone(CPU)
ON_TWO = {"fsdp2": fsdp2(2), "ZeRO-1": zero(1, 2), "ZeRO-2": zero(2, 2), "ZeRO-3": zero(3, 2)}
OFFLOAD = "parallel.cpu_offload=true"
ON_FOUR = {"fsdp2": fsdp2(4), "HSDP": fsdp2(2, replicate=2), "ZeRO-3": zero(3, 4)}


def whole(engine: Engine) -> dict[str, Tensor]:
    """All tensors, whole, in every process."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in engine.tensors().items()
    }


def weights(world: World, folder: Path, settings: list[list[str]]) -> list[dict[str, Tensor]]:
    return [whole(build_engine(tiny(folder, overrides), world)) for overrides in settings]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("model", [[], [*SEQ2SEQ, "model.tie_embeddings=false"]], ids=["decoder", "encoder-decoder"])
@pytest.mark.parametrize(("size", "engines"), [(2, ON_TWO), (4, ON_FOUR)])
def test_initial_weights_are_the_same_bits(
    tmp_path: Path, size: int, engines: dict[str, list[str]], model: list[str]
) -> None:
    (expected,) = weights(ALONE, tmp_path, [[*SINGLE, *model]])
    rows = ["train.micro_batch=1"]
    for results in run_world(size, weights, tmp_path, [[*each, *model, *rows] for each in engines.values()]):
        for found in results:
            assert_equal(found, expected)


def test_initial_weights_depend_on_the_seed_and_the_name_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    (first,) = weights(ALONE, tmp_path, [SINGLE])
    torch.manual_seed(2)
    again, deeper, other = weights(
        ALONE, tmp_path, [SINGLE, [*SINGLE, "model.decoder_layers=3", "model.mlp_ratio=0"], [*SINGLE, "seed=4"]]
    )
    assert_equal(again, first)
    shared = first.keys() & deeper.keys()
    assert len(shared) > 30
    for name in shared:
        assert torch.equal(first[name], deeper[name]), name
    assert not torch.equal(first["model.embedding.weight"], other["model.embedding.weight"])
    layer = "model.decoder.layers.{}.slots.{}.weight"
    assert torch.equal(first[layer.format(0, "read_address")], first[layer.format(0, "write_address")])
    assert not torch.equal(first[layer.format(0, "q_proj")], first[layer.format(1, "q_proj")])


def after_steps(world: World, folder: Path, settings: list[list[str]], count: int) -> list[dict[str, Tensor]]:
    results = []
    for overrides in settings:
        recipe = tiny(folder, overrides)
        engine = build_engine(recipe, world)
        steps(recipe, engine, count)
        results.append(whole(engine))
    return results


def test_weights_and_moments_after_steps(tmp_path: Path) -> None:
    """By the names that checkpoints have; an update is about lr = 3e-3, float32 rounding moves it by 1e-6."""
    (expected,) = after_steps(ALONE, tmp_path, [SINGLE], 3)
    assert "model.output.weight" not in expected, "a tied weight has one name"
    settings = [[*each, "train.micro_batch=2"] for each in ON_TWO.values()]
    for results in run_world(2, after_steps, tmp_path, settings, 3):
        for found in results:
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-6, msg=name)


def gradient_names(world: World, folder: Path, overrides: list[str]) -> tuple[set[str], set[str]]:
    """Parameters, and those with a gradient that is not zero everywhere in one of three steps: the surprise of
    memories counts once its slope has left zero, and not before the warm-up's first step."""
    recipe = tiny(folder, overrides)
    engine = build_engine(recipe, world)
    parameters = dict(engine.model.named_parameters())
    found: set[str] = set()

    def look(norm: Tensor) -> None:
        for name, parameter in parameters.items():
            gradient = parameter.grad
            if isinstance(gradient, DTensor):
                gradient = gradient.full_tensor()
            if gradient is not None and bool(gradient.any()):
                found.add(name)

    step = engine.step
    engine.step = lambda lr, norm: (look(norm), step(lr, norm))[1]  # type: ignore[method-assign,func-returns-value]
    steps(recipe, engine, 3)
    return set(parameters), found


@pytest.mark.parametrize("model", [[], SEQ2SEQ], ids=["decoder", "encoder-decoder"])
def test_every_parameter_gets_a_gradient(tmp_path: Path, model: list[str]) -> None:
    parameters, found = gradient_names(ALONE, tmp_path, [*SINGLE, *model])
    assert found == parameters
    for names, found in run_world(2, gradient_names, tmp_path, [*fsdp2(2), *model]):
        assert names == parameters == found


def moved(world: World, folder: Path, settings: list[list[str]]) -> list[set[str]]:
    """The tensors that three steps have not changed."""
    results = []
    for overrides in settings:
        recipe = tiny(folder, [*overrides, "optim.warmup=0"])
        engine = build_engine(recipe, world)
        before = whole(engine)
        steps(recipe, engine, 3)
        after = whole(engine)
        results.append({name for name in before if torch.equal(before[name], after[name])})
    return results


def test_zero_updates_every_parameter(tmp_path: Path) -> None:
    """DeepSpeed keeps gradients to itself, but a parameter with one moves by about lr in a first step of Adam's."""
    for results in run_world(2, moved, tmp_path, [zero(stage, 2) for stage in (1, 2, 3)]):
        assert results == [set(), set(), set()]


def test_weight_decay_is_that_of_the_whole_model(tmp_path: Path) -> None:
    """Shards have neither the attributes nor, under ZeRO-3, the shapes that it is told by."""
    engine = build_engine(tiny(tmp_path, SINGLE), ALONE)
    expected = decayed_parameters(engine.model)
    assert {"embedding.weight", "decoder.layers.0.slots.q_proj.weight"} <= expected
    assert not {"decoder.layers.0.lru.gate_proj.weight", "decoder.layers.0.lru_norm.weight"} & expected
    for names in run_world(2, decayed, tmp_path, list(ON_TWO.values())):
        assert names == [expected] * len(ON_TWO)


def decayed(world: World, folder: Path, settings: list[list[str]]) -> list[set[str]]:
    """Which parameters an update with a gradient of zero changes: those that decay."""
    results = []
    for overrides in settings:
        recipe = tiny(folder, [*overrides, "optim.warmup=0", "optim.weight_decay=0.5", "optim.lr=0.1"])
        engine = build_engine(recipe, world)
        before = whole(engine)
        compute = engine.losses
        engine.losses = lambda compute=compute, **named: _times(compute(**named), 0.0)  # type: ignore[method-assign]
        steps(recipe, engine, 1)
        after = whole(engine)
        results.append({name.removeprefix("model.") for name in before if not torch.equal(before[name], after[name])})
    return results


def _times(losses: TokenLosses, factor: float) -> TokenLosses:
    return replace(losses, nll=losses.nll * factor, z=losses.z * factor, balance=losses.balance * factor)


def skipping(world: World, folder: Path, settings: list[list[str]], what: str) -> list[tuple[list[bool], bool]]:
    """Of three steps the second, in the last process only, is not finite: which steps were skipped, and whether the
    weights of the others are those of a run without it."""
    results = []
    for overrides in settings:
        recipe = tiny(folder, overrides)
        engine = build_engine(recipe, world)
        compute, calls = engine.losses, 0
        batches = recipe.rows_per_step // world.size // recipe.train.micro_batch

        def losses(**named: Any) -> TokenLosses:
            nonlocal calls
            calls += 1
            result = compute(**named)  # noqa: B023
            if world.rank == world.size - 1 and calls == 2 * batches:  # noqa: B023
                return _not_finite(result, what)
            return result

        first = whole(engine)
        engine.losses = losses  # type: ignore[method-assign]
        done = steps(recipe, engine, 1)
        before = whole(engine)
        done += steps(recipe, engine, 1)
        after = whole(engine)
        done += steps(recipe, engine, 1)
        unchanged = all(torch.equal(before[name], after[name]) for name in before)
        last = whole(engine)
        moved = [not torch.equal(one["model.embedding.weight"], other["model.embedding.weight"])
                 for one, other in ((first, before), (after, last))]  # fmt: skip
        finite = all(bool(tensor.isfinite().all()) for tensor in last.values())
        results.append(([each.skipped for each in done], unchanged and finite and all(moved)))
    return results


def _not_finite(losses: TokenLosses, what: str) -> TokenLosses:
    if what == "loss":
        # Not finite without any gradient that is not: DeepSpeed looks at gradients only.
        return replace(losses, nll=losses.nll + math.nan)
    nll = losses.nll.clone()
    nll.register_hook(lambda gradient: gradient * math.inf)
    return replace(losses, nll=nll)


@pytest.mark.parametrize(
    ("what", "engines"),
    [("loss", [*ON_TWO.values()]), ("gradient", [fsdp2(2), *([*zero(s, 2), OFFLOAD] for s in (2, 3))])],
)
def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all(
    tmp_path: Path, what: str, engines: list[list[str]]
) -> None:
    settings = [[*each, "train.micro_batch=2", "optim.warmup=0"] for each in engines]
    for results in run_world(2, skipping, tmp_path, settings, what):
        assert results == [([False, True, False], True)] * len(settings)


def broken(world: World, folder: Path, settings: list[list[str]], what: str) -> list[str]:
    """What is said of a model, or an optimizer, with something that is not float32."""
    messages = []
    for overrides in settings:
        recipe = tiny(folder, overrides)
        engine = build_engine(recipe, world)
        if what == "parameters":
            engine.model.decoder.norm.weight.data = engine.model.decoder.norm.weight.data.double()
        else:
            _break_states(recipe, engine)
        try:
            steps(recipe, engine, 1)
            messages.append("")
        except AssertionError as error:
            messages.append(str(error))
        except RuntimeError as error:  # a gradient of another dtype than its parameter
            messages.append(f"RuntimeError {error}")
    return messages


def _break_states(recipe: Recipe, engine: Engine) -> None:
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # DeepSpeed's is around torch's
    make = optimizer.step

    def step(*arguments: Any) -> None:
        make(*arguments)
        for state in optimizer.state.values():
            state["exp_avg"] = state["exp_avg"].bfloat16()

    optimizer.step = step  # type: ignore[method-assign]


def test_the_dtypes_of_the_first_step_are_asserted(tmp_path: Path) -> None:
    (message,) = broken(ALONE, tmp_path, [SINGLE], "parameters")
    assert message == "parameters must be torch.float32: decoder.norm.weight is torch.float64"
    expected = "optimizer states must be torch.float32: .*exp_avg is torch.bfloat16"
    engines = [*ON_TWO.values()]
    for messages in [broken(ALONE, tmp_path, [SINGLE], "states"), *run_world(2, broken, tmp_path, engines, "states")]:
        for message in messages:
            assert message.startswith("optimizer states must be torch.float32: "), message
            assert message.endswith(("exp_avg is torch.bfloat16", ", ...")), (message, expected)


def test_zero_computes_in_bfloat16_whatever_is_around_it(tmp_path: Path) -> None:
    """On GPUs DeepSpeed switches off autocast before it calls what it wraps."""
    from slotmamba.engines.deepspeed import _Losses

    recipe = tiny(tmp_path, [*SINGLE, "train.precision=bf16"])
    engine = build_engine(recipe, ALONE)
    ids = torch.randint(recipe.model.vocab_size, (2, recipe.data.seq_len))
    wrapped = _Losses(engine.model, partial(compute_precision, CPU, "bf16"))
    with torch.autocast("cpu", enabled=False):
        nll = wrapped(input_ids=ids, labels=ids)[0]
    assert torch.equal(nll, engine.losses(input_ids=ids, labels=ids).nll)
    assert not torch.equal(nll, _Losses(engine.model, nullcontext)(input_ids=ids, labels=ids)[0])
