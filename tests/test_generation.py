"""Sampling, decoding by `step`, and text from checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import slotmamba
from slotmamba.config import Recipe, load_recipe
from slotmamba.config.schema import ModelConfig, SlotConfig
from slotmamba.generation import generate_text
from slotmamba.models import SlotMambaForCausalLM, SlotMambaForSeq2Seq, build_model
from slotmamba.sampling import generate_tokens, sample
from slotmamba_data import Tokenizer

SLOTS = SlotConfig(factors=2, factor_size=4, top_k=4, segment_len=5)
SMALL: dict[str, Any] = {
    "vocab_size": 29,
    "d_model": 16,
    "n_heads": 2,
    "decoder_layers": 2,
    "slots": SLOTS,
    "tie_embeddings": False,
}


def model_of(**changes: Any) -> Any:
    torch.manual_seed(1)
    model = build_model(ModelConfig(**(SMALL | changes)))
    # Logits far enough apart that the parallel and the stepwise form agree on the likeliest token.
    torch.nn.init.normal_(model.embedding.weight)
    torch.nn.init.normal_(model.output.weight)
    return model.eval()


def frequencies(probabilities: list[float], draws: int, **options: Any) -> Tensor:
    logits = torch.tensor(probabilities).log().expand(draws, -1)
    drawn = sample(logits, generator=torch.Generator().manual_seed(0), **options)
    assert drawn.shape == (draws,) and drawn.dtype == torch.int64
    return drawn.bincount(minlength=len(probabilities)) / draws


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.3}, [0, 1, 0, 0]),
        ({"top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        # top_p counts the mass of what top_k left: 4/7 is enough for 0.55 there, 0.4 would not be.
        ({"top_k": 2, "top_p": 0.55}, [0, 1, 0, 0]),
    ],
)
def test_draws_have_the_right_distribution(options: dict[str, Any], expected: list[float]) -> None:
    draws = 20_000
    found = frequencies([0.1, 0.4, 0.2, 0.3], draws, **options)
    error = (found - torch.tensor(expected)).abs().max()
    # Five standard deviations of a share of at most 1/2.
    assert error < 5 * 0.5 / draws**0.5
    assert ((found > 0) == (torch.tensor(expected) > 0)).all()


def test_top_p_keeps_one_token_however_small() -> None:
    assert frequencies([0.3, 0.7], 100, top_p=1e-9).tolist() == [0, 1]


def test_temperature_0_takes_the_likeliest_of_each_row() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -torch.inf, 1.0]])
    for temperature in (0, 1e-320):  # the second would make infinities of the logits
        assert sample(logits, temperature=temperature).tolist() == [1, 0]


def test_rows_are_drawn_on_their_own() -> None:
    logits = torch.full((2000, 2), -torch.inf)
    logits[::2, 0] = logits[1::2, 1] = 0.0
    assert sample(logits).tolist() == [0, 1] * 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(1, 3), **options)


@pytest.mark.parametrize("attention", [None, -2])
def test_greedy_tokens_are_the_likeliest_of_the_parallel_form(attention: int | None) -> None:
    model: SlotMambaForCausalLM = model_of(decoder_attn_layer=attention)
    prompt = torch.randint(29, (3, 4))
    tokens = model.generate(prompt, 12)
    assert tokens.shape == (3, 16) and tokens[:, :4].equal(prompt)
    with torch.no_grad():
        assert tokens[:, 4:].equal(model(tokens)[:, 3:-1].argmax(-1))
    assert len(tokens[:, 4:].unique()) > 3


def test_greedy_tokens_of_an_encoder_decoder() -> None:
    model: SlotMambaForSeq2Seq = model_of(encoder_layers=1, decoder_inject_layers=[0, 1])
    encoder_ids, prompt = torch.randint(29, (2, 6)), torch.randint(29, (2, 1))
    encoder_valid = torch.arange(6).expand(2, -1) < torch.tensor([[6], [4]])
    tokens = model.generate(prompt, 8, encoder_ids=encoder_ids, encoder_valid=encoder_valid)
    with torch.no_grad():
        logits = model(tokens, encoder_ids, encoder_valid=encoder_valid)
    assert tokens[:, 1:].equal(logits[:, :-1].argmax(-1))


def test_rows_end_one_by_one() -> None:
    model: SlotMambaForCausalLM = model_of()
    prompt = torch.randint(29, (4, 3))
    free = model.generate(prompt, 10)[:, 3:].tolist()
    eos = free[0][4]
    ended = model.generate(prompt, 10, eos_id=eos)[:, 3:].tolist()
    lengths = [row.index(eos) + 1 if eos in row else len(row) for row in free]
    assert len(set(lengths)) > 1
    for row, expected, length in zip(ended, free, lengths, strict=True):
        assert row == expected[:length] + [eos] * (max(lengths) - length)


def test_draws_repeat_by_seed() -> None:
    model: SlotMambaForCausalLM = model_of()
    prompt = torch.randint(29, (2, 2))
    first, again, other = (model.generate(prompt, 20, temperature=1.0, seed=seed) for seed in (3, 3, 4))
    assert first.equal(again) and not first.equal(other)


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        model_of().generate(torch.zeros(1, 0, dtype=torch.long), 1)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, list):
        for entry in value:
            yield from tensors(entry)


def test_the_state_does_not_grow_without_attention() -> None:
    """Measured in bytes of storage: a view of something that grows would count."""

    def sizes(attention: int | None) -> list[int]:
        model: SlotMambaForCausalLM = model_of(decoder_attn_layer=attention)
        state, found = model.init_state(1), []
        with torch.no_grad():
            for token in range(23):
                _, state = model.step(torch.tensor([token]), state)
                storages = [each.untyped_storage() for each in tensors(state)]
                found.append(sum({each.data_ptr(): each.nbytes() for each in storages}.values()))
        return found

    without = sizes(None)
    # In the first segment of 5 tokens the layers share one copy of the empty memory as the segment's start.
    assert len(set(without[5:])) == 1
    growing = sizes(-1)
    assert growing[-1] - growing[5] == 17 * 2 * 16 * 4  # keys and values of 17 tokens, 16 channels of 4 bytes


def pieces(run: Path, prompt: str = "She was", **options: Any) -> list[str]:
    return list(generate_text(run, prompt, **({"max_new_tokens": 30, "device": "cpu"} | options)))


def test_text_is_that_of_the_tokens(text_run: Path) -> None:
    recipe = load_recipe(text_run / "recipe.yaml")
    assert recipe.data.tokenizer is not None
    tokenizer = Tokenizer(recipe.data.tokenizer)
    model = slotmamba.load(text_run)
    prompt = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("She was")]])
    state = model.init_state(1)
    drawn = generate_tokens(model, state, prompt, temperature=1.0, seed=7, vocab_size=tokenizer.vocab_size)
    tokens = [int(next(drawn)) for _ in range(30)]
    if tokenizer.eos_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_id)]
    found = pieces(text_run, temperature=1.0, seed=7)
    assert "".join(found) == tokenizer.decode(tokens)
    assert len(found) > 5 and all(found)


def test_text_repeats_by_seed(text_run: Path) -> None:
    assert pieces(text_run, temperature=1.0, seed=1) == pieces(text_run, temperature=1.0, seed=1)
    assert pieces(text_run, temperature=1.0, seed=1) != pieces(text_run, temperature=1.0, seed=2)


def test_text_ends_with_the_document(text_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(text_run / "recipe.yaml")
    assert recipe.data.tokenizer is not None
    tokenizer = Tokenizer(recipe.data.tokenizer)
    said = [*tokenizer.encode("né ").tolist(), tokenizer.eos_id, *tokenizer.encode("more").tolist()]

    def generated(*args: object, **options: object) -> Iterator[Tensor]:
        yield from torch.tensor(said).view(-1, 1)

    monkeypatch.setattr("slotmamba.generation.generate_tokens", generated)
    assert "".join(pieces(text_run)) == "né "
    assert pieces(text_run)[0] == "n"


def variant(text_run: Path, folder: Path, changes: dict[str, Any]) -> Recipe:
    content = load_recipe(text_run / "recipe.yaml").model_dump(mode="json") | {"run_dir": str(folder / "run")}
    for key, value in changes.items():
        content[key] = content[key] | value
    return Recipe.model_validate(content)


def test_an_encoder_decoder_reads_the_prompt(text_run: Path, save_run: Any, tmp_path: Path) -> None:
    recall = {"form": "seq2seq", "vocab_size": 64, "settings": [{"length": 8, "pairs": 4}]}
    changes = {
        "model": {"encoder_layers": 1, "decoder_inject_layers": [0, 1]},
        "data": {"sources": [{"name": "recall", "kind": "mqar", "mqar": recall}], "validation": []},
    }
    run = save_run(variant(text_run, tmp_path, changes))
    first = "".join(pieces(run, "She was", temperature=1.0))
    assert first and first != "".join(pieces(run, "They were", temperature=1.0))


def test_a_run_without_tokenizer_says_so(text_run: Path, save_run: Any, tmp_path: Path) -> None:
    run = save_run(variant(text_run, tmp_path, {"data": {"tokenizer": None}}))
    with pytest.raises(ValueError, match="text was trained without a tokenizer"):
        pieces(run)


def test_a_missing_tokenizer_is_named(text_run: Path, save_run: Any, tmp_path: Path) -> None:
    run = save_run(variant(text_run, tmp_path, {"data": {"tokenizer": str(tmp_path / "gone.model")}}))
    with pytest.raises(ValueError, match=r"gone\.model"):
        pieces(run)


def test_a_larger_tokenizer_is_refused(text_run: Path, save_run: Any, tmp_path: Path) -> None:
    run = save_run(variant(text_run, tmp_path, {"model": {"vocab_size": 599}}))
    with pytest.raises(ValueError, match="has 600 tokens, the model only 599"):
        pieces(run)


def test_bad_arguments_before_anything_is_loaded(tmp_path: Path) -> None:
    for options in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 2.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            pieces(tmp_path, **options)
    with pytest.raises(ValueError, match="has no checkpoint"):
        pieces(tmp_path)
