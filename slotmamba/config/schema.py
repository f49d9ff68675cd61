"""The recipe: one typed object that says everything about a run.

Every field carries its documentation in ``description``: `slotmamba --help` texts and docs/recipes.md are made from
it. Unknown keys and wrong types are refused by pydantic, impossible combinations by the validators below; all of them
raise ``pydantic.ValidationError``, a ``ValueError``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from slotmamba.config.data import DataConfig, SourceConfig
from slotmamba.config.duration import Duration
from slotmamba.config.section import Name, Section
from slotmamba.config.slurm import SlurmConfig

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]

Checkpointing = Literal["none", "block", "selective"]

Sweep = Annotated[
    dict[str, list[Any]],
    Field(json_schema_extra={"words": "dotted keys of the recipe with a list of values each"}),
]


class BDLRUConfig(Section):
    block_size: int = Field(4, ge=1, le=64, description="Channels that one block of the linear recurrence mixes (m).")


class SSMConfig(Section):
    state_size: int = Field(64, ge=1, description="State channels of each Mamba-2 head of the encoder (N).")
    head_dim: int = Field(32, ge=1, description="Channels of each Mamba-2 head of the encoder (P).")
    expand: int = Field(2, ge=1, description="Inner width of a Mamba-2 block as a multiple of d_model.")
    conv_size: int = Field(4, ge=1, description="Taps of the short depthwise convolution.")
    chunk_size: int = Field(64, ge=1, description="Tokens that the chunked scan handles at once; changes speed only.")


class SlotConfig(Section):
    """The slot memory: hksa.md, sections 1 to 5."""

    addressing: Literal["kronecker", "flat"] = Field(
        "kronecker",
        description="`kronecker`: an address is a product of `factors` softmaxes; `flat`: one softmax over all slots.",
    )
    factors: int = Field(5, ge=1, le=10, description="Softmax factors of an address (U).")
    factor_size: int = Field(4, ge=2, description="Entries of each factor (p); there are p^U slots a head.")
    top_k: int = Field(8, ge=1, le=32, description="Slots that one token writes, and slots that it reads (K).")
    address_conv: int = Field(
        4, ge=1, le=16, description="Taps of the causal convolution over a write address's logits; 1 leaves it out."
    )
    householder_steps: int = Field(1, ge=1, le=4, description="Householder edits of one write (n).")
    segment_len: int = Field(1024, ge=1, description="Tokens between two hand-overs of state from layer to layer.")
    thread_layers: bool = Field(
        True,
        description="At segment boundaries mix each layer's memory with that of the layer below, gated by surprise.",
    )
    log_temperature: float = Field(1.0, description="Start of the learned log-temperature of an address (alpha).")
    balance: float = Field(
        0.05, ge=0.0, description="Weight of the loss term that keeps the factors of addresses in use."
    )

    @property
    def num_slots(self) -> int:
        """Slots of one head, M = p^U."""
        return self.factor_size**self.factors

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.addressing == "flat" and self.factors != 1:
            raise ValueError(
                "flat addressing has one factor: "
                f"set factors=1 and factor_size to the number of slots, not factors={self.factors}"
            )
        if self.num_slots > 4**10:
            raise ValueError(f"factor_size^factors = {self.num_slots} slots, more than the {4**10} that are supported")
        if self.top_k > self.num_slots:
            raise ValueError(
                f"top_k={self.top_k} is more than the factor_size^factors = {self.num_slots} slots there are"
            )
        return self


class ModelConfig(Section):
    family: Literal["slotmamba"] = Field("slotmamba", description="Model family.")
    vocab_size: int = Field(8192, ge=2, description="Entries of the token embedding.")
    d_model: int = Field(256, ge=1, description="Width of the residual stream.")
    n_heads: int = Field(4, ge=1, description="Heads of the slot memory and of attention.")
    encoder_layers: int = Field(0, ge=0, description="Encoder layers; 0 makes a decoder-only model.")
    decoder_layers: int = Field(4, ge=1, description="Decoder layers.")
    encoder_attn_layers: list[int] = Field([], description="Encoder layers that are full attention instead of Mamba-2.")
    decoder_attn_layer: int | None = Field(
        None, description="Decoder layer with causal attention; -2 is the penultimate, null is none."
    )
    decoder_inject_layers: list[int] = Field(
        [], description="Decoder layers whose slots attend to the encoder's output."
    )
    mlp_ratio: float = Field(
        0.0, ge=0.0, description="Hidden width of the SwiGLU as a multiple of d_model; 0 leaves it out."
    )
    tie_embeddings: bool = Field(True, description="Use the token embedding as output matrix too.")
    bdlru: BDLRUConfig = Field(BDLRUConfig(), description="Block-diagonal linear recurrence of each decoder layer.")
    ssm: SSMConfig = Field(SSMConfig(), description="Mamba-2 blocks of the encoder.")
    slots: SlotConfig = Field(SlotConfig(), description="Slot memory of each decoder layer.")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def attention_layer(self) -> int | None:
        """The decoder layer with attention as an index from 0, or None."""
        layer = self.decoder_attn_layer
        return layer if layer is None or layer >= 0 else layer + self.decoder_layers

    @property
    def segmented(self) -> bool:
        """Whether the slot memory runs in segments: they exist for the hand-over between layers and for injection;
        without either the memory runs in one go."""
        return (self.slots.thread_layers and self.decoder_layers > 1) or bool(self.decoder_inject_layers)

    def most_chunks(self, length: int) -> int:
        """Chunks that a sequence of `length` tokens can be cut into: its segments, or tokens where there are none."""
        return -(-length // self.slots.segment_len) if self.segmented else length

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}")
        if self.decoder_attn_layer is not None and self.head_dim % 2:
            raise ValueError(f"attention rotates pairs of channels: d_model/n_heads = {self.head_dim} must be even")
        if self.d_model % self.bdlru.block_size:
            raise ValueError(f"d_model={self.d_model} is not divisible by bdlru.block_size={self.bdlru.block_size}")
        inner = self.ssm.expand * self.d_model
        if self.encoder_layers and inner % self.ssm.head_dim:
            raise ValueError(f"ssm.expand*d_model = {inner} is not divisible by ssm.head_dim={self.ssm.head_dim}")
        if self.attention_layer is not None and not 0 <= self.attention_layer < self.decoder_layers:
            raise ValueError(
                f"decoder_attn_layer={self.decoder_attn_layer} is not one of the {self.decoder_layers} decoder layers"
            )
        for key, layers, count in (
            ("encoder_attn_layers", self.encoder_attn_layers, self.encoder_layers),
            ("decoder_inject_layers", self.decoder_inject_layers, self.decoder_layers),
        ):
            wrong = [layer for layer in layers if not 0 <= layer < count]
            if wrong or len(set(layers)) != len(layers):
                raise ValueError(f"{key}={layers}: expected distinct layers between 0 and {count - 1}")
        if self.decoder_inject_layers and not self.encoder_layers:
            raise ValueError("decoder_inject_layers needs an encoder: set encoder_layers")
        if self.encoder_layers and not self.decoder_inject_layers:
            raise ValueError("an encoder reaches the decoder only through decoder_inject_layers, which is empty")
        return self


class OptimConfig(Section):
    name: Literal["adamw"] = Field("adamw", description="Optimizer.")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), strict=False, description="Decay of AdamW's two moment averages.")
    eps: float = Field(1e-8, gt=0, description="AdamW's denominator offset.")
    weight_decay: float = Field(
        0.1, ge=0, description="Decoupled weight decay of matrices; never of gates, temperatures, norms, biases."
    )
    schedule: Literal["cosine", "wsd", "linear"] = Field("cosine", description="Learning rate after the warm-up.")
    warmup: int = Field(0, ge=0, description="Steps of linear warm-up.")
    decay: float = Field(
        0.2, gt=0, le=1, description="wsd only: share of the steps, at the end, in which the rate decays."
    )
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Learning rate at the end as a share of the peak.")
    clip_norm: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 does not clip.")
    z_loss: float = Field(0.0, ge=0, description="Weight of mean(logsumexp(logits)^2) over the valid tokens.")


class CheckpointConfig(Section):
    # `async` is a word of Python's.
    model_config = ConfigDict(serialize_by_alias=True)

    every: int = Field(500, ge=1, description="Steps between checkpoints.")
    keep: int = Field(2, ge=1, description="Committed checkpoints to keep.")
    in_background: bool = Field(
        False,
        alias="async",
        description="Train on while a thread writes a copy of the state in CPU memory; not with deepspeed.",
    )
    on_error: Literal["stop", "continue"] = Field(
        "stop",
        description="A checkpoint that cannot be written (disk full): stop, or warn and try again at the next. "
        "`continue` also goes on without the lines of metrics.jsonl for which there is no room.",
    )


class TrainConfig(Section):
    steps: int | None = Field(None, ge=1, description="Optimizer steps; give this or `tokens`.")
    tokens: int | None = Field(None, ge=1, description="Training tokens, padding included; rounded up to whole steps.")
    global_batch_tokens: int = Field(65536, ge=1, description="Tokens of an optimizer step, whatever the accumulation.")
    micro_batch: int = Field(8, ge=1, description="Rows of one forward pass.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Compute precision; parameters are fp32 always.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto` takes a GPU when there is one.")
    activation_checkpointing: Checkpointing = Field(
        "none",
        description="What the backward pass computes again to save memory. `none`: nothing; `block`: every layer, from "
        "its input; `selective`: all of a layer but its matrix products and attention, the slot memory above all.",
    )
    sequence_chunks: int = Field(
        1,
        ge=1,
        description="Chunks of the sequence that a decoder layer runs one after the other, carrying its state; more "
        "than 1 are recomputed one at a time in the backward pass. They are whole segments of `slots.segment_len`.",
    )
    log_every: int = Field(10, ge=1, description="Steps between lines of metrics.jsonl.")
    eval_every: int = Field(500, ge=1, description="Steps between validations; there is one at the end as well.")
    eval_rows: int = Field(64, ge=1, description="Rows of each validation source, the same ones each time.")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="Checkpoints.")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="A loss or gradient that is not finite: stop, or skip the step."
    )
    max_skips: int = Field(10, ge=1, description="Skipped steps in a row after which `skip` stops too.")
    time_limit: Duration | None = Field(
        None, description="Wall time from the start of the command by which the run is to have saved and stopped."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give either train.steps or train.tokens, one of them")
        return self

    @property
    def total_steps(self) -> int:
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // self.global_batch_tokens)


class ParallelConfig(Section):
    engine: Literal["single", "fsdp2", "deepspeed"] = Field(
        "single", description="`single`: one process; `fsdp2`: PyTorch's sharding; `deepspeed`: ZeRO."
    )
    replicate: int = Field(1, ge=1, description="fsdp2: groups of processes that each hold the whole model (HSDP).")
    shard: int = Field(1, ge=1, description="Processes that the model is spread over; replicate * shard are started.")
    zero_stage: int = Field(
        1,
        ge=1,
        le=3,
        description="deepspeed: spread the optimizer states (1), the gradients too (2), the parameters too (3).",
    )
    cpu_offload: bool = Field(
        False, description="fsdp2: keep parameters, gradients and optimizer states in CPU memory; deepspeed: the last."
    )

    first_step_timeout: Duration = Field(
        "1h", description="Longest wait for the first step, which compiles and fills caches, before the job is ended."
    )
    step_timeout: Duration = Field(
        "10m", description="The same for every step, validation batch and save after it: processes hang, or one does."
    )

    @property
    def size(self) -> int:
        """Processes of the world."""
        return self.replicate * self.shard

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.engine == "single" and self.size > 1:
            raise ValueError(
                f"engine=single is one process, not replicate * shard = {self.size}: set engine=fsdp2 or deepspeed"
            )
        if self.engine == "single" and self.cpu_offload:
            raise ValueError("cpu_offload needs engine=fsdp2 or deepspeed: engine=single has nothing to offload")
        if self.engine != "deepspeed" and self.zero_stage != 1:
            raise ValueError(
                f"zero_stage={self.zero_stage} is for engine=deepspeed, not engine={self.engine}: "
                "set engine=deepspeed, or leave zero_stage out"
            )
        if self.engine == "deepspeed" and self.replicate > 1:
            raise ValueError(
                f"ZeRO shards over all processes, replicate={self.replicate} is for engine=fsdp2 (HSDP): "
                f"set replicate=1 shard={self.size}"
            )
        return self


class WandbConfig(Section):
    mode: Literal["disabled", "offline", "online"] = Field(
        "disabled", description="Weights & Biases: off, on disk only, or live."
    )
    project: str = Field("slotmamba", description="Weights & Biases project.")


class LoggingConfig(Section):
    wandb: WandbConfig = Field(WandbConfig(), description="Weights & Biases sink; metrics.jsonl is written always.")


class Recipe(Section):
    name: Name = Field(description="Name of the run.")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of initial weights and data order.")
    run_dir: Path = Field(Path(), strict=False, description="Folder of the run; the default `.` stands for runs/NAME.")
    model: ModelConfig = Field(ModelConfig(), description="The model.")
    data: DataConfig = Field(description="What it trains on.")
    optim: OptimConfig = Field(OptimConfig(), description="How it is optimised.")
    train: TrainConfig = Field(description="How long, how much at a time, how often it reports and saves.")
    parallel: ParallelConfig = Field(ParallelConfig(), description="How many processes train together, and how.")
    logging: LoggingConfig = Field(LoggingConfig(), description="Where metrics go besides metrics.jsonl.")
    slurm: SlurmConfig = Field(SlurmConfig(), description="What `slotmamba submit` asks of a Slurm cluster.")
    sweep: Sweep | None = Field(
        None,
        description="Values to try, such as `{optim.lr: [1e-3, 3e-4], model.slots.top_k: [4, 8]}`: `slotmamba submit` "
        "trains every combination, each in a folder of its own in `run_dir`.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        tokens, seq_len, micro_batch = self.train.global_batch_tokens, self.data.seq_len, self.train.micro_batch
        rows, rest = divmod(tokens, seq_len)
        if rest:
            raise ValueError(f"train.global_batch_tokens={tokens} is not a multiple of data.seq_len={seq_len}")
        size = self.parallel.size
        if rows % (size * micro_batch):
            on_each = f" rows on each of {size} processes (parallel.replicate * parallel.shard)" if size > 1 else ""
            raise ValueError(
                f"a global batch has {rows} rows (train.global_batch_tokens / data.seq_len), "
                f"not a multiple of train.micro_batch={micro_batch}{on_each}"
            )
        if self.train.checkpoint.in_background and self.parallel.engine == "deepspeed":
            raise ValueError("train.checkpoint.async needs parallel.engine single or fsdp2: DeepSpeed saves in place")
        if self.optim.warmup > self.train.total_steps:
            raise ValueError(
                f"optim.warmup={self.optim.warmup} is more than the {self.train.total_steps} steps of the run"
            )
        self._check_chunks()
        for source in (*self.data.sources, *self.data.validation):
            self._check_source(source)
        return self

    def _check_chunks(self) -> None:
        chunks, length = self.train.sequence_chunks, self.data.seq_len
        most = self.model.most_chunks(length)
        if chunks > most and self.model.segmented:
            raise ValueError(
                f"train.sequence_chunks={chunks}: chunks are whole segments, and a row of data.seq_len={length} has "
                f"{most} of model.slots.segment_len={self.model.slots.segment_len}; take fewer chunks"
            )
        if chunks > most:
            raise ValueError(f"train.sequence_chunks={chunks} is more than the data.seq_len={length} tokens of a row")

    def _check_source(self, source: SourceConfig) -> None:
        where = f"source {source.name!r}"
        if source.kind == "lm" and self.model.encoder_layers:
            raise ValueError(
                f"{where} of kind lm has nothing for the encoder to read: set model.encoder_layers=0, "
                "or use seq2seq sources of kind mqar"
            )
        if source.mqar is None:
            return
        mqar = source.mqar
        if mqar.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"{where}: mqar.vocab_size={mqar.vocab_size} is more than model.vocab_size={self.model.vocab_size}"
            )
        if (mqar.form == "seq2seq") != (self.model.encoder_layers > 0):
            raise ValueError(
                f"{where}: mqar.form=seq2seq goes with an encoder, mqar.form=decoder without one, "
                f"not mqar.form={mqar.form} with model.encoder_layers={self.model.encoder_layers}"
            )
        longest = max(setting.length for setting in mqar.settings)
        if longest > self.data.seq_len:
            raise ValueError(
                f"{where}: samples of {longest} tokens do not fit rows of data.seq_len={self.data.seq_len} tokens"
            )

    @property
    def rows_per_step(self) -> int:
        return self.train.global_batch_tokens // self.data.seq_len

    @property
    def run_path(self) -> Path:
        return self.run_dir if self.run_dir != Path() else Path("runs") / self.name
