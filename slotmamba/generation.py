"""Text from a checkpoint: `slotmamba generate`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from slotmamba.checkpoint import load_model, recipe_path
from slotmamba.config import Recipe, load_recipe
from slotmamba.device import choose_device
from slotmamba.errors import InputError
from slotmamba.models import SlotMambaForCausalLM, SlotMambaForSeq2Seq
from slotmamba.sampling import check_sampling, generate_tokens
from slotmamba_data import StreamDecoder, Tokenizer
from slotmamba_data.tokenizer_file import JSON_NAME, MODEL_NAME


def generate_text(
    checkpoint: Path | str,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Iterator[str]:
    """Text after a prompt, piece by piece as its characters are complete, up to the end of the document.

    A decoder-only model goes on after the beginning of a document and the prompt; an encoder-decoder model encodes the
    prompt as a whole document and starts one of its own. Parameters and computation are float32.

    Args:
        checkpoint: a run folder or one of its checkpoints.
        prompt: text; empty starts a document.
        max_new_tokens: tokens after which to stop when the document has not ended, at least 1.
        temperature, top_k, top_p: as for `slotmamba.sampling.sample`.
        seed: of the draws.
        device: auto, cpu or cuda.

    Returns:
        The pieces; joined they are the text that follows the prompt. Everything is loaded before this returns.

    Raises:
        InputError: an argument out of range, no checkpoint, a run without a tokenizer, or one whose file is missing or
            does not fit the model.
        SlotMambaError: the checkpoint is not as it was written, or each of the run's is not.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    check_sampling(temperature, top_k, top_p)
    place = choose_device(device, "device")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed={seed}: expected 0 to 2^63 - 1")
    recipe_file = recipe_path(Path(checkpoint))
    tokenizer = _tokenizer(load_recipe(recipe_file), recipe_file.parent)
    model = load_model(checkpoint, place)
    begun = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    if isinstance(model, SlotMambaForSeq2Seq):
        with torch.no_grad():
            state = model.init_state(1, torch.tensor([[*begun, tokenizer.eos_id]], device=place))
        begun = [tokenizer.bos_id]
    else:
        assert isinstance(model, SlotMambaForCausalLM)
        state = model.init_state(1)
    drawn = generate_tokens(
        model,
        state,
        torch.tensor([begun], device=place),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        vocab_size=tokenizer.vocab_size,
    )
    return _text(tokenizer, (int(token) for token in islice(drawn, max_new_tokens)))


def _text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """The text of the tokens before the first end of a document."""
    decoder = StreamDecoder(tokenizer)
    for token in tokens:
        if token == tokenizer.eos_id:
            break
        piece = decoder.push(token)
        if piece:
            yield piece
    rest = decoder.flush()
    if rest:
        yield rest


def _tokenizer(recipe: Recipe, run_dir: Path) -> Tokenizer:
    """The run's own copy of its tokenizer: the recipe's may be elsewhere, or another one by now."""
    path = recipe.data.tokenizer
    if path is None:
        raise InputError(
            f"{recipe.name} was trained without a tokenizer, so its tokens are not text: "
            "`generate` needs a run with data.tokenizer set (for recall models there is `slotmamba evaluate`)"
        )
    own = (run_dir / name for name in (MODEL_NAME, JSON_NAME))
    tokenizer = Tokenizer(next((file for file in own if file.is_file()), path))
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise InputError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, the model only {recipe.model.vocab_size}: "
            "it is not the tokenizer of this run"
        )
    return tokenizer
