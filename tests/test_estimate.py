"""Estimates against real models, PyTorch's own FLOP counter, scalars that count, and tensors that autograd keeps."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slotmamba.config import Recipe, installed_recipes, load_recipe
from slotmamba.config.schema import ModelConfig
from slotmamba.estimate import estimate, report
from slotmamba.estimate.flops import _merging, forward_flops, slot_memory
from slotmamba.estimate.measure import estimated, measure
from slotmamba.estimate.measure import main as measuring
from slotmamba.estimate.row import RowShape, row_shape
from slotmamba.models import SlotMambaForCausalLM, SlotMambaForSeq2Seq, build_model
from slotmamba.optim import build_optimizer

SLOTS: dict[str, Any] = {"factors": 2, "factor_size": 3, "top_k": 2, "address_conv": 3, "segment_len": 4}
TINY: dict[str, Any] = {
    "vocab_size": 16,
    "d_model": 8,
    "n_heads": 2,
    "decoder_layers": 2,
    "decoder_attn_layer": 1,
    "mlp_ratio": 2.0,
    "bdlru": {"block_size": 2},
    "slots": SLOTS | {"householder_steps": 2},
}
ENCODER: dict[str, Any] = {
    "encoder_layers": 2,
    "encoder_attn_layers": [1],
    "decoder_inject_layers": [1],
    "ssm": {"state_size": 4, "head_dim": 4, "chunk_size": 5},
}
RECALL = {"form": "seq2seq", "vocab_size": 64, "settings": [{"length": 9, "pairs": 8}, {"length": 5, "pairs": 9}]}


def recipe_of(model: dict[str, Any], seq_len: int = 12, rows: int = 4, **sections: Any) -> Recipe:
    """Text from shards that are not there, or recall for an encoder-decoder."""
    text = {"name": "text", "kind": "lm", "shards": "nowhere"}
    recall = {"name": "recall", "kind": "mqar", "mqar": RECALL}
    content = {
        "name": "tiny",
        "model": model,
        "data": {"seq_len": seq_len, "sources": [recall if "encoder_layers" in model else text]},
        "train": {"steps": 10, "global_batch_tokens": seq_len * rows, "micro_batch": rows},
    }
    return Recipe.model_validate(content | sections)


@pytest.mark.parametrize(
    "model",
    [TINY, TINY | {"tie_embeddings": False}, {"decoder_layers": 1}, TINY | ENCODER | {"vocab_size": 64}],
    ids=["decoder", "untied", "defaults", "encoder-decoder"],
)
def test_parameters_are_those_of_the_model(model: dict[str, Any]) -> None:
    found = estimate(recipe_of(model))
    real = build_model(ModelConfig.model_validate(model))
    assert found.total_parameters == sum(parameter.numel() for parameter in real.parameters())

    def size(*modules: torch.nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    layers = list(real.decoder.layers)
    injections = [layer.slots.injection for layer in layers if layer.slots.injection is not None]
    expected = {
        "embedding": size(real.embedding),
        "attention": size(*(layer.attention for layer in layers if layer.attention is not None)),
        "BD-LRU": size(*(layer.lru for layer in layers)),
        "slot memory": size(*(layer.slots for layer in layers)) - size(*injections),
        "injection": size(*injections),
        "MLP": size(*(layer.mlp for layer in layers if layer.mlp is not None)),
        "output": 0 if real.config.tie_embeddings else size(real.output),
    }
    if isinstance(real, SlotMambaForSeq2Seq):
        mamba, attentive = real.encoder.layers
        expected |= {
            "encoder Mamba-2": size(mamba.mixer),
            "encoder attention": size(attentive.mixer),
            "encoder MLP": size(mamba.mlp, attentive.mlp),
        }
    norms = found.total_parameters - sum(expected.values())
    assert found.parameters == {key: number for key, number in expected.items() if number} | {"norms": norms}
    assert norms % real.config.d_model == 0 and norms > 0


def test_flops_of_a_tiny_model_by_hand() -> None:
    """C=8, H=2, d=4; U=2, p=3, K=2, n=2, M=9; BD-LRU blocks of 2; MLP of 16; 16 tokens of vocabulary; rows of 12."""
    found = forward_flops(ModelConfig.model_validate(TINY), RowShape(tokens=12, encoder_tokens=0, labelled=0.5))
    matmul = {name: flops.matmul for name, flops in found.items()}
    assert matmul == {
        # q, k, v, out 4 * 8*8 multiply-adds; a token sees 6.5 tokens on average, 8 multiply-adds twice.
        "attention": 2 * 4 * 64 + 2 * 2 * 8 * 6.5,
        # Two layers: v and out 8x8, gates 8x24.
        "BD-LRU": 2 * 2 * (64 + 64 + 192),
        # q, gate, out 8x8; k, u_k, u_v 8x16; beta 8x4.
        "slot memory: projections": 2 * 2 * (3 * 64 + 3 * 128 + 32),
        # Two matrices of 8x12.
        "slot memory: addresses": 2 * 2 * (2 * 96),
        "slot memory: write": 0,
        # Two heads, two slots, four channels, keys and values.
        "slot memory: read": 2 * 2 * (2 * 2 * 4 * 2),
        # Two heads, two steps, four channels, keys and values; in two of three segments.
        "slot memory: surprise": pytest.approx(2 * 2 * (2 * 2 * 4 * 2) * 8 / 12),
        "slot memory: threading": 0,
        # Three matrices of 8x16 in two layers.
        "MLP": 2 * 2 * 3 * 128,
        "norms": 0,
        # Half of the positions.
        "output": 2 * 8 * 16 / 2,
    }
    other = {name: flops.other for name, flops in found.items()}
    # Rotation of q and k; softmax of two heads.
    assert other["attention"] == 3 * 16 + 3 * 2 * 6.5
    # 24 gates: bias and softmax; 8 channels: two multiply-adds of the state, one of the input.
    assert other["BD-LRU"] == 2 * (24 * 4 + 8 * 6)
    # Norms of q (8), k and u_k (16 each), 3 a channel; 4 betas: bias, sigmoid, doubling; the output's norm and gate.
    assert other["slot memory: projections"] == 2 * (3 * 40 + 5 * 4 + 4 * 8 + 5 * 8)
    # A head has 6 entries. Convolution of 3 taps; two addresses: 8 an entry, the first factor's 3 entries compared, as
    # K=2, the second's 6 candidates added and compared, 2 exponentials.
    assert other["slot memory: addresses"] == 2 * 2 * (2 * 3 * 6 + 2 * (8 * 6 + 3 + 6 + 6 + 2))
    # Three norms in one layer, four in that with attention, 4 a channel each, and a sum after each; the last norm.
    assert other["norms"] == (4 + 3) * 5 * 8 + 4 * 8
    assert other["MLP"] == 2 * 5 * 16
    assert other["output"] == 3 * 16 / 2


class Counted:
    """A number that counts the operations made with it."""

    operations = 0

    def _counted(self, *others: object) -> Counted:
        Counted.operations += 1
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _counted
    minimum = maximum = log = log1p = exp = _counted

    def sigmoid(self) -> Counted:
        return 1 / (1 + self.exp())


def operations(function: Any, *sizes: int) -> int:
    Counted.operations = 0
    function(*sizes)
    return Counted.operations


def write(dim: int, steps: int) -> None:
    """hksa.md section 2 for one slot, number by number."""
    x = Counted()
    w, z, memory = x, x, [[x] * dim, [x] * dim]
    a = (x * w.minimum(0.999).log1p()).exp()
    z = a * z + w
    memory = [[a * s for s in vector] for vector in memory]
    for _ in range(steps):
        size = w * x  # w beta
        for which, vector in enumerate(memory):
            along: Any = x  # a dot product of d channels counts as d multiply-adds
            for s in vector:
                along = along + x * s
            along = size * along
            memory[which] = [s + size * x - along * x for s in vector]


def surprise_of_a_token(dim: int, steps: int) -> None:
    x = Counted()
    total: Any = x
    for _ in range(steps):
        total = total + x
    for _ in range(2 * dim):
        _ = total / total


def surprise_of_a_slot(dim: int) -> None:
    """a_s, 1 - a_s and 1 - eta are a head's, not a token's."""
    x = Counted()
    errors = []
    for _ in range(2):
        squares: Any = x
        for _ in range(dim):
            difference = x / x - x
            squares = squares + difference * difference
        errors.append(squares / dim)
    error = x * errors[0] + x * errors[1]
    rate = x * x
    _ = x + rate * (error - x)


def read_of_a_slot() -> None:
    """Beside the two dot products."""
    x = Counted()
    inverse = 1 / x
    score = x * inverse * 0.5 + x.maximum(1e-30).log()
    p = (score.exp() + x) / x
    _ = p * inverse


def hand_over_of_a_slot(dim: int) -> None:
    x = Counted()
    gate = (x + x * (x + 1e-6).log()).sigmoid()
    for _ in range(2 * dim + 2):
        _ = x + gate * (x - x)


@pytest.mark.parametrize(("heads", "dim", "active", "steps"), [(2, 4, 2, 2), (1, 6, 3, 1), (3, 2, 5, 4)])
def test_slot_memory_against_counting_scalars(heads: int, dim: int, active: int, steps: int) -> None:
    slots = SLOTS | {"top_k": active, "householder_steps": steps}
    model = {"d_model": heads * dim, "n_heads": heads, "decoder_layers": 3, "slots": slots}
    config = ModelConfig.model_validate(model | {"bdlru": {"block_size": 1}})
    found = slot_memory(config, RowShape(tokens=10, encoder_tokens=0, labelled=1.0))
    layers, boundaries, total_slots = 3, 2, 9
    assert found["write"].other == layers * heads * active * operations(write, dim, steps)
    assert found["read"].other == layers * heads * active * operations(read_of_a_slot)
    surprise = operations(surprise_of_a_token, dim, steps) + active * operations(surprise_of_a_slot, dim)
    assert found["surprise"].other == pytest.approx(layers * heads * surprise * 8 / 10, rel=1e-12)  # 2 of 3 segments
    hand_over = boundaries * heads * total_slots * operations(hand_over_of_a_slot, dim)
    assert found["threading"].other == pytest.approx((layers - 1) * hand_over / 10, rel=1e-12)


def test_merging_counts_candidates() -> None:
    # 3 entries, all kept; 9 sums, the best 8 selected; 24 sums, selected.
    assert _merging(factors=3, size=3, active=8) == 9 + 9 + 24 + 24
    # Flat: one comparison a slot.
    assert _merging(factors=1, size=100, active=8) == 100


def counted_by_pytorch(model: torch.nn.Module, *inputs: Tensor) -> int:
    # The counter does not know the CPU's fused attention, but the matrix products that it stands for.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(*inputs)
    # The short convolutions of Mamba-2 are convolutions to the counter; here they are no matrix products.
    convolutions = [count for count in counter.get_flop_counts()["Global"].items() if "convolution" in str(count[0])]
    return counter.get_total_flops() - sum(count for _, count in convolutions)


@pytest.mark.parametrize("changes", [{}, {"decoder_attn_layer": None}, {"slots": SLOTS | {"thread_layers": False}}])
def test_matrix_products_against_pytorchs_counter(changes: dict[str, Any]) -> None:
    config = ModelConfig.model_validate(TINY | changes)
    batch, length = 3, 12
    counted = counted_by_pytorch(build_model(config), torch.randint(16, (batch, length)))
    found = forward_flops(config, RowShape(length, 0, labelled=1.0))
    expected = sum(flops.matmul for flops in found.values()) * batch * length
    if config.attention_layer is not None:
        # The counter takes all pairs of tokens, we those that causal attention needs.
        expected += batch * 4 * 8 * (length * length - length * (length + 1) // 2)
    assert counted == round(expected)


def test_matrix_products_of_an_encoder_decoder_against_pytorchs_counter() -> None:
    config = ModelConfig.model_validate(TINY | ENCODER | {"decoder_attn_layer": None})
    batch, length, encoder_length = 3, 4, 12  # one segment; keys and values of the encoder are projected once
    inputs = torch.randint(16, (batch, length)), torch.randint(16, (batch, encoder_length))
    found = forward_flops(config, RowShape(length, encoder_length, labelled=1.0))
    expected = sum(flops.matmul for flops in found.values()) * batch * length
    assert counted_by_pytorch(build_model(config), *inputs) == round(expected)


def test_rows_of_a_recipe() -> None:
    assert row_shape(recipe_of(TINY)) == RowShape(12, 0, 1.0)
    # The encoder's row is that of 9 pairs; 8 and 4 queries in rows of 12, half of the rows each.
    assert row_shape(recipe_of(TINY | ENCODER | {"vocab_size": 64})) == RowShape(12, 20, 0.5)
    settings = [{"length": 16, "pairs": 4}, {"length": 40, "pairs": 8, "weight": 3}]
    recall = {"name": "recall", "kind": "mqar", "mqar": {"vocab_size": 64, "settings": settings}, "weight": 2}
    text = {"name": "text", "shards": "nowhere"}
    mixed = recipe_of(TINY | {"vocab_size": 64}, 40, data={"seq_len": 40, "sources": [recall, text]})
    # Rows of 16 hold two samples, 8 labels; rows of 40 one sample, 8 labels as well; text has labels everywhere.
    assert row_shape(mixed).labelled == pytest.approx((2 * 8 / 40 + 1) / 3, rel=1e-12)


def test_totals() -> None:
    found = estimate(recipe_of(TINY))
    assert found.training_flops == 3 * found.forward_flops
    assert found.run_flops == found.training_flops * 48 * 10


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [each for field in fields(value) for each in tensors(getattr(value, field.name))]
    return [each for entry in value for each in tensors(entry)] if isinstance(value, list) else []


def distinct_bytes(found: list[Tensor]) -> int:
    """Bytes of the tensors, those that share memory once."""
    return sum({each.data_ptr(): each.nbytes for each in found}.values())


def test_weights_and_optimizer() -> None:
    recipe = recipe_of(TINY)
    model = SlotMambaForCausalLM(recipe.model)
    optimizer = build_optimizer(model, recipe.optim)
    model.losses(torch.randint(16, (2, 12)), torch.randint(16, (2, 12))).nll.sum().backward()
    optimizer.step()
    memory = estimate(recipe).memory
    parameters = list(model.parameters())
    assert memory.parameters == memory.gradients == distinct_bytes(parameters)
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    # Parameters that the loss does not reach have no moments yet: the balance term is not in it.
    reached = sum(parameter.numel() for parameter in parameters if parameter.grad is not None)
    assert distinct_bytes(moments) == 8 * reached
    assert memory.optimizer == 2 * memory.parameters


@pytest.mark.parametrize("attention", [None, 1])
def test_decoding_state(attention: int | None) -> None:
    recipe = recipe_of(TINY | {"decoder_attn_layer": attention})
    memory = estimate(recipe).memory
    model = SlotMambaForCausalLM(recipe.model)
    state, tokens = model.init_state(1), 11
    with torch.no_grad():
        for token in range(tokens):
            _, state = model.step(torch.tensor([token]), state)
    assert distinct_bytes(tensors(state)) == memory.decoding_state + tokens * memory.decoding_per_token


def test_decoding_state_of_an_encoder_decoder() -> None:
    recipe = recipe_of(TINY | ENCODER | {"vocab_size": 64, "decoder_attn_layer": None})
    model = SlotMambaForSeq2Seq(recipe.model)
    with torch.no_grad():
        state = model.init_state(1, torch.randint(64, (1, 20)))
        for token in range(11):
            _, state = model.step(torch.tensor([token]), state)
    assert distinct_bytes(tensors(state)) == estimate(recipe).memory.decoding_state


def kept_for_backward(recipe: Recipe, *inputs: Tensor, **options: Tensor) -> int:
    """Bytes that autograd keeps of one micro-batch, beside parameters and inputs."""
    model = build_model(recipe.model)
    known = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *inputs, *options.values())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in known:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model.losses(*inputs, **options)
    assert losses.nll.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


WIDE: dict[str, Any] = {"vocab_size": 512, "d_model": 64, "decoder_attn_layer": 1, "mlp_ratio": 2.0}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_heads": 4, "decoder_attn_layer": None, "mlp_ratio": 0.0},
        {"slots": {"factors": 3, "top_k": 4, "householder_steps": 3, "segment_len": 16}},
        {"slots": {"factors": 3, "thread_layers": False}, "bdlru": {"block_size": 8}},
    ],
)
def test_activations_within_a_factor_of_2(changes: dict[str, Any]) -> None:
    slots = {"factors": 3, "segment_len": 32}
    batch, length = 4, 64
    recipe = recipe_of({"n_heads": 2, "decoder_layers": 2, "slots": slots} | WIDE | changes, length, batch)
    ids, labels = torch.randint(512, (2, batch, length))
    doc_start = torch.zeros(batch, length, dtype=torch.long)
    doc_start[:, 40:] = 40
    valid = torch.ones(batch, length, dtype=torch.bool)
    kept = kept_for_backward(recipe, ids, labels, doc_start=doc_start, valid=valid)
    assert 0.5 < _kept(recipe) / kept < 2


def test_activations_of_an_encoder_decoder_within_a_factor_of_2() -> None:
    recipe = recipe_of(WIDE | ENCODER | {"n_heads": 2, "decoder_layers": 2, "slots": {"factors": 3}})
    ids, labels, encoder_ids = torch.randint(512, (4, 12)), torch.randint(512, (4, 12)), torch.randint(512, (4, 20))
    labels[:, 6:] = -100
    kept = kept_for_backward(recipe, ids, labels, encoder_ids, encoder_valid=torch.ones(4, 20, dtype=torch.bool))
    assert 0.5 < _kept(recipe) / kept < 2


def _kept(recipe: Recipe) -> float:
    """The estimate without what the backward pass itself makes."""
    memory = estimate(recipe).memory
    return sum(memory.activations.values()) + memory.boundary_states - memory.activations["backward workspace"]


@pytest.mark.parametrize(("seq_len", "numbers"), [(100, 100 * 50_304), (64_000, 1280 * 50_304)])
def test_logits_take_a_block_at_most(seq_len: int, numbers: int) -> None:
    """Where they are more than the workspace of a slot layer."""
    model = TINY | {"vocab_size": 50_304, "decoder_attn_layer": None}
    assert estimate(recipe_of(model, seq_len, 1)).memory.activations["backward workspace"] == 4 * numbers


MODES = [("none", 1), ("block", 1), ("selective", 1), ("none", 2), ("none", 8)]


def with_modes(model: dict[str, Any], seq_len: int, rows: int, **train: Any) -> list[Recipe]:
    """The recipe with each of MODES."""
    made = []
    for mode, chunks in MODES:
        keys = {"steps": 1, "global_batch_tokens": seq_len * rows, "micro_batch": rows}
        keys |= {"activation_checkpointing": mode, "sequence_chunks": chunks} | train
        made.append(recipe_of(model, seq_len, rows, train=keys))
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decoder_attn_layer": None, "mlp_ratio": 0.0, "slots": {"factors": 3, "top_k": 4, "thread_layers": False}},
        ENCODER | {"decoder_attn_layer": None, "ssm": {"state_size": 16, "head_dim": 16, "chunk_size": 64}},
    ],
    ids=["threaded", "not threaded", "encoder"],
)
def test_what_recomputation_keeps_within_15_percent(changes: dict[str, Any]) -> None:
    """Allocations counted: what waits for the backward pass, and the peak within it. Each way of recomputing has less
    of a peak than the one before, and eight chunks less than a quarter of what keeping all has."""
    slots = {"factors": 3, "top_k": 4, "householder_steps": 2, "segment_len": 32}
    model = {"n_heads": 2, "decoder_layers": 4, "slots": slots} | WIDE | {"decoder_attn_layer": -2} | changes
    peaks: dict[tuple[str, int], int] = {}
    recipes = with_modes(model, 256, 1)
    for recipe in recipes if not changes else recipes[1::2]:
        found, (kept, peak) = measure(recipe, torch.device("cpu")), estimated(estimate(recipe).memory)
        key = recipe.train.activation_checkpointing, recipe.train.sequence_chunks
        assert kept == pytest.approx(found.kept, rel=0.15), key
        assert peak == pytest.approx(found.peak, rel=0.15), key
        peaks[key] = found.peak
    if not changes:
        order = [("none", 8), ("none", 2), ("block", 1), ("selective", 1), ("none", 1)]
        assert [peaks[key] for key in order] == sorted(peaks[key] for key in order)
        assert peaks["none", 8] < peaks["none", 1] / 4


@pytest.mark.slow
def test_what_recomputation_keeps_under_autocast() -> None:
    model = {"n_heads": 2, "decoder_layers": 4, "slots": {"factors": 3, "top_k": 4, "segment_len": 32}} | WIDE
    for recipe in with_modes(model, 256, 1, precision="bf16")[1:4]:
        found, (kept, peak) = measure(recipe, torch.device("cpu")), estimated(estimate(recipe).memory)
        assert kept == pytest.approx(found.kept, rel=0.15), recipe.train
        assert peak == pytest.approx(found.peak, rel=0.15), recipe.train


@pytest.mark.slow
def test_the_measuring_command(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["train.micro_batch=1", "data.seq_len=128", "train.global_batch_tokens=128", "train.device=cpu"]
    assert measuring(["lm-tiny", *shape]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "none, 1", "selective, 1", "block, 1", "none, 2", "selective, 2"
    ]  # fmt: skip
    assert measuring(["no-such-recipe"]) == 2 and "no-such-recipe" in capsys.readouterr().err
    assert measuring([]) == 2


def test_bf16_keeps_less() -> None:
    recipe = recipe_of(WIDE)
    train = recipe.train.model_copy(update={"precision": "bf16"})
    half, full = (estimate(each).memory for each in (recipe.model_copy(update={"train": train}), recipe))
    assert 0.5 < sum(half.activations.values()) / sum(full.activations.values()) < 1
    assert (half.parameters, half.boundary_states) == (full.parameters, full.boundary_states)


@pytest.mark.parametrize("name", installed_recipes())
def test_installed_recipes_can_be_estimated(name: str) -> None:
    recipe = load_recipe(name)
    found, text = estimate(recipe), report(recipe)
    assert f"{found.total_parameters:,}" in text and f"{found.forward_flops:,.0f}" in text
    for part in (*found.parameters, *(key.rpartition(": ")[2] for key in found.forward), *found.memory.activations):
        assert any(line.strip().startswith(f"{part} ") for line in text.splitlines()), part
    assert max(map(len, text.splitlines())) <= 100
