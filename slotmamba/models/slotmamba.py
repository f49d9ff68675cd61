"""SlotMamba: a decoder-only language model, and an encoder-decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slotmamba.config.schema import Checkpointing, ModelConfig
from slotmamba.models.decoder import Decoder, DecoderState
from slotmamba.models.encoder import Encoder
from slotmamba.models.initial import normal, starts
from slotmamba.models.injection import EncoderOutput
from slotmamba.models.layers import OutputMatrix
from slotmamba.sampling import generate

IGNORED = -100  # label of a position without loss


@dataclass(frozen=True)
class TokenLosses:
    """Losses of the N labelled positions of a batch, float32, not reduced.

    nll: [N] cross-entropy in nats; z: [N] squared log-partition; correct: [N] whether the likeliest token is the label;
    row: [N] row of the batch; position: [N] position in the row; balance: the slot memories' balance term, a mean over
        rows.
    """

    nll: Tensor
    z: Tensor
    correct: Tensor
    row: Tensor
    position: Tensor
    balance: Tensor


class _SlotMamba(nn.Module):
    """Embedding, decoder and output matrix, which both models have."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        starts(self.embedding.weight, normal(0.02))
        self.decoder = Decoder(config)
        self.output = OutputMatrix(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight
        else:
            starts(self.output.weight, normal(0.02))

    def save_memory(self, checkpointing: Checkpointing, sequence_chunks: int = 1) -> None:
        """Has the backward pass compute again what it would otherwise keep. Values without gradients stay as they are.

        checkpointing, sequence_chunks: as `train.activation_checkpointing` and `train.sequence_chunks` of a recipe.
        Losses of rows with fewer segments (or tokens) than sequence_chunks raise ValueError.
        """
        self.decoder.checkpointing, self.decoder.sequence_chunks = checkpointing, sequence_chunks

    def step(self, tokens: Tensor, state: DecoderState, *, consume: bool = False) -> tuple[Tensor, DecoderState]:
        """One token for every row: tokens [B] -> logits [B, V] of the next token, and the state after it.

        `state` stays as it is, and decoding can go on from it again, unless `consume` gives it away: then the step may
        overwrite the slot memories instead of copying them. Only a state that a step has returned can be given away,
        since that of `init_state` is one memory for all layers.
        """
        hidden, state = self.decoder.step(self.embedding(tokens), state, consume=consume)
        return self.output(hidden), state

    def _hidden(
        self, input_ids: Tensor, doc_start: Tensor | None, valid: Tensor | None, encoder: EncoderOutput | None
    ) -> tuple[Tensor, Tensor]:
        return self.decoder(self.embedding(input_ids), doc_start=doc_start, valid=valid, encoder=encoder)

    def _losses(self, hidden: Tensor, balance: Tensor, labels: Tensor) -> TokenLosses:
        """The output matrix runs on labelled positions only: in recall data they are a small part."""
        row, position = (labels != IGNORED).nonzero(as_tuple=True)
        nll, log_partition, correct = self.output(hidden[row, position], labels[row, position])
        return TokenLosses(
            nll=nll,
            z=log_partition.square(),
            correct=correct,
            row=row,
            position=position,
            balance=balance,
        )


class SlotMambaForCausalLM(_SlotMamba):
    """Decoder-only language model.

    Raises ValueError for a config with encoder layers.
    """

    def __init__(self, config: ModelConfig) -> None:
        if config.encoder_layers:
            raise ValueError("SlotMambaForCausalLM has no encoder: set encoder_layers=0 or use SlotMambaForSeq2Seq")
        super().__init__(config)

    def forward(self, input_ids: Tensor, *, doc_start: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """input_ids [B, T] -> logits [B, T, V].

        doc_start: [B, T] index in the row of the first token of each token's document, None for one document a row;
        valid: [B, T], False for padding.
        """
        hidden, _ = self._hidden(input_ids, doc_start, valid, None)
        return self.output(hidden)

    def losses(
        self, input_ids: Tensor, labels: Tensor, *, doc_start: Tensor | None = None, valid: Tensor | None = None
    ) -> TokenLosses:
        """Losses at the positions whose label [B, T] is not -100; labels are aligned with the inputs, not shifted."""
        hidden, balance = self._hidden(input_ids, doc_start, valid, None)
        return self._losses(hidden, balance, labels)

    def init_state(self, batch: int) -> DecoderState:
        """State of `step` before the first token. Its size does not grow with the tokens, but for attention's cache."""
        return self.decoder.init_state(batch)

    def generate(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Continues input_ids [B, T >= 1] by up to max_new_tokens; options as for `slotmamba.sampling.generate`."""
        return generate(self, self.init_state(len(input_ids)), input_ids, max_new_tokens, **options)


class SlotMambaForSeq2Seq(_SlotMamba):
    """Encoder-decoder: the encoder's output reaches the decoder by injection into its slots.

    Raises ValueError for a config without encoder layers.
    """

    def __init__(self, config: ModelConfig) -> None:
        if not config.encoder_layers:
            raise ValueError("SlotMambaForSeq2Seq needs an encoder: set encoder_layers or use SlotMambaForCausalLM")
        super().__init__(config)
        self.encoder = Encoder(config)

    def save_memory(self, checkpointing: Checkpointing, sequence_chunks: int = 1) -> None:
        super().save_memory(checkpointing, sequence_chunks)
        self.encoder.checkpointing = checkpointing

    def encode(self, encoder_ids: Tensor, encoder_valid: Tensor | None = None) -> EncoderOutput:
        """encoder_ids [B, S] (embedded with the decoder's embedding) and which of them are tokens [B, S]."""
        if encoder_valid is None:
            encoder_valid = torch.ones_like(encoder_ids, dtype=torch.bool)
        return EncoderOutput(self.encoder(self.embedding(encoder_ids), encoder_valid), encoder_valid)

    def forward(
        self,
        input_ids: Tensor,
        encoder_ids: Tensor,
        *,
        encoder_valid: Tensor | None = None,
        doc_start: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Decoder input_ids [B, T] and encoder_ids [B, S] -> logits [B, T, V]."""
        hidden, _ = self._hidden(input_ids, doc_start, valid, self.encode(encoder_ids, encoder_valid))
        return self.output(hidden)

    def losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        encoder_ids: Tensor,
        *,
        encoder_valid: Tensor | None = None,
        doc_start: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> TokenLosses:
        """Losses at the positions whose label [B, T] is not -100; labels are aligned with the inputs, not shifted."""
        hidden, balance = self._hidden(input_ids, doc_start, valid, self.encode(encoder_ids, encoder_valid))
        return self._losses(hidden, balance, labels)

    def init_state(
        self, batch: int, encoder_ids: Tensor | None = None, encoder_valid: Tensor | None = None
    ) -> DecoderState:
        """State of `step` before the first token: encodes encoder_ids [batch, S]."""
        if encoder_ids is None:
            raise ValueError("decoding with an encoder starts from encoder_ids")
        return self.decoder.init_state(batch, self.encode(encoder_ids, encoder_valid))

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        encoder_ids: Tensor,
        encoder_valid: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Continues decoder input_ids [B, T >= 1], given encoder_ids [B, S]; options as for
        `slotmamba.sampling.generate`."""
        with torch.no_grad():
            state = self.init_state(len(input_ids), encoder_ids, encoder_valid)
        return generate(self, state, input_ids, max_new_tokens, **options)


SlotMamba = SlotMambaForCausalLM | SlotMambaForSeq2Seq


def build_model(config: ModelConfig) -> SlotMamba:
    """The model that a recipe's model section describes, with fresh weights from torch's random state.

    Training starts from `slotmamba.models.initial.InitialWeights` instead, which do not depend on how it is built.
    """
    return SlotMambaForSeq2Seq(config) if config.encoder_layers else SlotMambaForCausalLM(config)
