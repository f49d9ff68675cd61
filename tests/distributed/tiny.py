"""Tiny recipes for the engines: every kind of layer, three segments a row, rows with very different label counts."""

from __future__ import annotations

import os
from pathlib import Path

from slotmamba.batch import plan_source
from slotmamba.config import Recipe, load_recipe
from slotmamba.engines import Engine, build_engine
from slotmamba.global_step import GlobalStep, StepResult
from slotmamba.schedule import learning_rate
from slotmamba.world import World
from slotmamba_data import PlanReader, open_plan

RECIPE = """\
name: tiny
seed: 3
model:
  vocab_size: 96
  d_model: 16
  n_heads: 2
  decoder_layers: 2
  decoder_attn_layer: 0
  mlp_ratio: 1.0
  slots: {factors: 2, factor_size: 4, top_k: 2, segment_len: 9}
data:
  seq_len: 24
  sources:
    - name: short
      kind: mqar
      weight: 0.5
      mqar: {vocab_size: 64, settings: [{length: 8, pairs: 2}, {length: 24, pairs: 4}]}
    - {name: long, kind: mqar, mqar: {vocab_size: 64, settings: [{length: 24, pairs: 6}]}}
# With the default eps of 1e-8 Adam makes whole updates of what rounding leaves of gradients near zero: two runs of one
# process with other accumulations then drift apart ten to a hundred times faster.
optim: {lr: 3.0e-3, warmup: 2, z_loss: 0.001, eps: 1.0e-6}
train: {steps: 20, device: cpu, global_batch_tokens: 384, micro_batch: 4}
"""
SEQ2SEQ = [
    "model.encoder_layers=2",
    "model.encoder_attn_layers=[1]",
    "model.decoder_inject_layers=[1]",
    "model.slots.segment_len=4",
    "model.ssm={state_size: 4, head_dim: 16, chunk_size: 8}",
    "data.sources=[{name: recall, kind: mqar, mqar: {form: seq2seq, vocab_size: 64, "
    "settings: [{length: 4, pairs: 3}, {length: 24, pairs: 12}]}}]",
]
SINGLE = ["parallel.engine=single"]


def fsdp2(shard: int, replicate: int = 1) -> list[str]:
    return ["parallel.engine=fsdp2", f"parallel.shard={shard}", f"parallel.replicate={replicate}"]


def zero(stage: int, shard: int) -> list[str]:
    return ["parallel.engine=deepspeed", f"parallel.zero_stage={stage}", f"parallel.shard={shard}"]


def tiny(folder: Path, overrides: list[str]) -> Recipe:
    file = folder / "tiny.yaml"
    if not file.exists():  # every process of a world may be the first: none may read what another has half written
        own = folder / f"tiny.yaml.{os.getpid()}"
        own.write_text(RECIPE)
        own.replace(file)
    return load_recipe(file, overrides)


def steps(recipe: Recipe, engine: Engine, count: int) -> list[StepResult]:
    """The first steps of a run, without the run around them."""
    plan = open_plan(list(map(plan_source, recipe.data.sources)), recipe.data.seq_len, recipe.seed)
    reader, step = PlanReader(plan), GlobalStep(recipe, engine)
    return [step(reader, learning_rate(recipe.optim, number, recipe.train.total_steps)) for number in range(count)]


def trained(world: World, folder: Path, settings: list[list[str]], count: int) -> list[list[StepResult]]:
    """The first steps of several recipes, one after the other in the same processes."""
    results = []
    for overrides in settings:
        recipe = tiny(folder, overrides)
        results.append(steps(recipe, build_engine(recipe, world), count))
    return results
