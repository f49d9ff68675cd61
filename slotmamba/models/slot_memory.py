"""The HKSA layer: projections and addresses around the slot memory op, segment by segment (hksa.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slotmamba.config.schema import ModelConfig
from slotmamba.models.initial import constant, starts, starts_like
from slotmamba.models.injection import EncoderMemory, SlotInjection
from slotmamba.models.layers import Float32Linear, for_products
from slotmamba.models.short_conv import ShortConv
from slotmamba.models.threading import SurpriseGate
from slotmamba_kernels import SegmentEnds, SlotState, hksa, hksa_step_, hksa_threaded, kronecker_topk
from slotmamba_kernels.hksa.arguments import Inject, documents_of


@dataclass
class SlotInputs:
    """What the op takes of a stretch of tokens, all but the state: tensors [B, T, H, ...]."""

    q: Tensor
    k: Tensor
    u_k: Tensor
    u_v: Tensor
    beta: Tensor
    write_idx: Tensor
    write_w: Tensor
    read_idx: Tensor
    read_w: Tensor


@dataclass(frozen=True)
class SlotLayerState:
    """State of step-by-step decoding: the memory now and as its segment began; the write address's last logits.

    The memory has a row for every slot, however many there are: a step overwrites rows, it does not make new ones.
    Only injection reads segment_start; without it, steps in place may have overwritten its tensors.
    """

    memory: SlotState
    segment_start: SlotState
    window: Tensor | None


class SlotMemory(nn.Module):
    """One layer's slot memory: y = W_o(RMSNorm_head(o) * silu(W_g x)), o read from the slots that x also writes.

    Args:
        config: the model.
        layer: its number among the decoder layers; layers above 0 are threaded to the one below.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        slots = config.slots
        self.config = slots
        self.segment_len = slots.segment_len if config.segmented else None
        self.heads, self.dim = config.n_heads, config.head_dim
        width, steps = config.d_model, slots.householder_steps
        factors = self.heads * slots.factors * slots.factor_size
        # In float32 under autocast too: addresses choose slots, and one token must choose the same ones however it is
        # computed.
        self.write_address = Float32Linear(width, factors, bias=False)
        self.read_address = Float32Linear(width, factors, bias=False)
        # Reading starts with the hash that writing uses, so that a key finds what was written under it from step 1 on.
        starts_like(self.read_address.weight, self.write_address.weight)
        self.write_conv = ShortConv(factors, slots.address_conv) if slots.address_conv > 1 else None
        # Decay would pull the temperature back to 1 and addresses back to uniform: hksa.md section 8.
        self.log_temperature = starts(nn.Parameter(torch.empty(2, self.heads)), constant(slots.log_temperature))
        self.log_temperature.no_weight_decay = True  # type: ignore[attr-defined]
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, steps * width, bias=False)
        self.u_k_proj = nn.Linear(width, steps * width, bias=False)
        self.u_v_proj = nn.Linear(width, steps * width, bias=False)
        self.beta_proj = nn.Linear(width, steps * self.heads)
        self.decay_power = self._head_parameter(0.0)  # gamma = softplus
        self.norm = nn.RMSNorm(self.dim)
        self.gate_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        # Without threading nothing looks at the surprise, so it is not computed.
        threaded = slots.thread_layers and config.decoder_layers > 1
        self.surprise_mix = self._head_parameter(0.0) if threaded else None  # a_s = sigmoid
        self.surprise_memory = self._head_parameter(2.0) if threaded else None  # eta = sigmoid
        self.surprise_gate = SurpriseGate(self.heads) if threaded and layer > 0 else None
        self.injection = SlotInjection(config) if layer in config.decoder_inject_layers else None

    def forward(
        self,
        x: Tensor,
        *,
        memory: SlotState | None = None,
        below: SegmentEnds | None = None,
        window: Tensor | None = None,
        doc_start: Tensor | None = None,
        valid: Tensor | None = None,
        encoder: EncoderMemory | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, SegmentEnds, Tensor | None, Tensor]:
        """Runs the memory over the tokens of x, whole segments but for the last of a row.

        Args:
            x: [B, T, C].
            memory, window: what the tokens before x have left, None at a row's start.
            below: memories of the layer below at the ends of these segments; None for the lowest layer.
            doc_start: [B, T] as in `slotmamba_kernels.hksa`.
            valid: [B, T], False for padding, which writes nothing.
            encoder: output of the encoder, for layers with injection.
            return_state: whether tokens follow, so that somebody takes over the memory after the last segment.

        Returns:
            y [B, T, C]; the memories at the ends of the segments, of the last one surely with return_state only; the
            window after x; what `balance` needs of x: [2, B, H, U, p], the distributions of the factors of write and
            read addresses, summed over the tokens.
        """
        write_logits, window_after = self.write_address(x), None
        if self.write_conv is not None:
            window_after = self.write_conv.window_after(write_logits, window)
            write_logits = self.write_conv(write_logits, doc_start, window)
        rounded = for_products(x)
        inputs, use = self._inputs(x, rounded, write_logits, valid)

        def inject(span: slice, entering: SlotState | None) -> Inject:
            assert self.injection is not None and encoder is not None
            here = x[:, span], inputs.write_idx[:, span]
            return self.injection(*here, entering, documents_of(doc_start, span), encoder)

        gate = self.surprise_gate
        o, ends = hksa_threaded(
            **vars(inputs),
            gamma=F.softplus(self.decay_power),
            num_slots=self.config.num_slots,
            segment_len=self.segment_len or x.shape[1],
            gate=None if gate is None else (gate.bias, gate.slope),
            below=below,
            state=memory,
            doc_start=doc_start,
            surprise=self._surprise(),
            inject=None if self.injection is None else inject,
            return_state=return_state,
        )
        return self._output(o, rounded), ends, window_after, use

    def step(
        self, x: Tensor, state: SlotLayerState, encoder: EncoderMemory | None, *, consume: bool = False
    ) -> tuple[Tensor, SlotLayerState]:
        """One token: x [B, C] -> y [B, C] and the state after it.

        consume: the memory of `state` may be overwritten instead of copied, in a single kernel on GPUs; it is where
        there is no injection and no gradient.
        """
        write_logits, window = self.write_address(x), state.window
        if self.write_conv is not None:
            assert window is not None
            write_logits, window = self.write_conv.step(write_logits, window)
        x, write_logits = x.unsqueeze(1), write_logits.unsqueeze(1)
        if consume and self.injection is None and not torch.is_grad_enabled():
            memory = state.memory.map(Tensor.contiguous)
            o = self._step_in_place(x, write_logits, memory)
        else:
            inputs, _ = self._inputs(x, x, write_logits, None)
            inject = None
            if self.injection is not None:
                assert encoder is not None
                inject = self.injection(x, inputs.write_idx, state.segment_start, None, encoder)
            o, after = hksa(
                **vars(inputs),
                gamma=F.softplus(self.decay_power),
                num_slots=self.config.num_slots,
                state=state.memory,
                surprise=self._surprise(),
                inject=inject,
            )
            assert after is not None
            memory = after
        return self._output(o, x).squeeze(1), SlotLayerState(memory, state.segment_start, window)

    def init_state(self, memory: SlotState) -> SlotLayerState:
        """State of `step` before the first token, given the memory before it, dense."""
        window = None if self.write_conv is None else self.write_conv.init_window(len(memory.z))
        return SlotLayerState(memory, memory, window)

    def hand_over(self, own: SlotState, below: SlotState | None) -> SlotState:
        """The memory that a segment starts from: this layer's at the end of the one before, mixed with `below`."""
        if self.surprise_gate is None or below is None:
            return own
        return self.surprise_gate(own, below)

    def _head_parameter(self, start: float) -> nn.Parameter:
        return starts(nn.Parameter(torch.empty(self.heads)), constant(start))

    def _step_in_place(self, x: Tensor, write_logits: Tensor, memory: SlotState) -> Tensor:
        """One token, x [B, 1, C] and its logits [B, 1, H*U*p], written into the memory -> o [B, 1, H, d]."""
        read_logits = self.read_address(x)
        q, k, u_k, u_v, beta = (vector.squeeze(1) for vector in self._vectors(x))
        o = hksa_step_(
            q,
            k,
            u_k,
            u_v,
            beta,
            write_logits=self._address_logits(write_logits, 0).squeeze(1),
            read_logits=self._address_logits(read_logits, 1).squeeze(1),
            gamma=F.softplus(self.decay_power),
            state=memory,
            top_k=self.config.top_k,
            surprise=self._surprise(),
        )
        return o.unsqueeze(1)

    def _surprise(self) -> tuple[Tensor, Tensor] | None:
        """(a_s, eta) of hksa.md."""
        if self.surprise_mix is None or self.surprise_memory is None:
            return None
        return self.surprise_mix.sigmoid(), self.surprise_memory.sigmoid()

    def _inputs(
        self, x: Tensor, rounded: Tensor, write_logits: Tensor, valid: Tensor | None
    ) -> tuple[SlotInputs, Tensor]:
        """rounded: x as matrices take it, which addresses do not."""
        batch, length, _ = x.shape
        write_logits = self._address_logits(write_logits, 0)
        read_logits = self._address_logits(self.read_address(x), 1)
        write_idx, write_w = kronecker_topk(write_logits, self.config.top_k)
        read_idx, read_w = kronecker_topk(read_logits, self.config.top_k)
        if valid is not None:
            write_w = write_w * valid.view(batch, length, 1, 1)
        inputs = SlotInputs(
            *self._vectors(rounded), write_idx=write_idx, write_w=write_w, read_idx=read_idx, read_w=read_w
        )
        return inputs, torch.stack([_use(write_logits, valid), _use(read_logits, valid)])

    def _vectors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q [B, T, H, d], k, u_k, u_v [B, T, H, n, d] and beta [B, T, H, n] of the tokens x [B, T, C]."""
        per_head = (*x.shape[:2], self.heads, self.dim)
        per_step = (*x.shape[:2], self.heads, self.config.householder_steps, self.dim)
        u_v = self.u_v_proj(x).view(per_step)
        # Autocast norms in float32. The op computes in float32 whatever it is given, but keeps the dtype of its inputs
        # for what waits in memory.
        return (
            F.rms_norm(self.q_proj(x).view(per_head), (self.dim,)).to(u_v.dtype),
            F.normalize(self.k_proj(x).view(per_step), dim=-1).to(u_v.dtype),
            F.rms_norm(self.u_k_proj(x).view(per_step), (self.dim,)).to(u_v.dtype),
            u_v,
            2 * self.beta_proj(x).view(per_step[:-1]).sigmoid(),
        )

    def _address_logits(self, logits: Tensor, which: int) -> Tensor:
        """Float32 [B, T, H*U*p] -> [B, T, H, U, p] with the write (0) or read (1) temperature applied."""
        shape = (*logits.shape[:2], self.heads, self.config.factors, self.config.factor_size)
        return logits.view(shape) * self.log_temperature[which].exp().view(-1, 1, 1)

    def balance(self, use: Tensor, tokens: Tensor | int) -> Tensor:
        """sum_u (log p - entropy of the factor's mean distribution over a row's tokens), mean over heads and rows, of
        write and read addresses together.

        The mean is over a row, not over the batch, so that the term is a mean over rows, the same for any accumulation
        and any number of processes (docs/decisions.md).

        use: [2, B, H, U, p] of a whole row; tokens: how many it is summed over, [B] or of every row.
        """
        mean = use / (tokens.clamp(min=1).view(-1, 1, 1, 1) if isinstance(tokens, Tensor) else tokens)
        entropy = -(mean * (mean + 1e-9).log()).sum(-1)
        return (math.log(self.config.factor_size) - entropy).sum(-1).mean((1, 2)).sum()

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.out_proj(self.norm(o.to(self.norm.weight.dtype)).flatten(2) * F.silu(self.gate_proj(x)))


def _use(logits: Tensor, valid: Tensor | None) -> Tensor:
    """Distributions of the factors of logits [B, T, H, U, p], summed over the tokens that count."""
    probabilities = logits.softmax(-1)
    if valid is not None:
        # Not a matrix product, which autocast would round to bfloat16.
        probabilities = probabilities * valid.view(*valid.shape, 1, 1, 1)
    return probabilities.sum(1)
