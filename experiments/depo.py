"""Depo with sleep.

  python -m experiments.main --config=experiments/depo.py

The edges of a cycle of named nodes are read in random order, at the larger
sizes torn over several windows, and evicted; then it is asked which node is k
hops on from another (paper, section 6). `eval/hops_K/loss` and `accuracy` are
those of questions of k hops alone, over cycles of full length. Sizes:
  pocket (default): 12 nodes; 1, 2, 4 or 8 hops (4 the other way round), 1
    window; minutes on 2 CPU cores.
  deep: the same cycles, and 8 hops learned too: more steps, of which the later
    half sees full cycles alone.
  tiny: seconds, and the time to compile, for tests; learns nothing much.
  paper: 75 nodes, up to 16 hops, 4 windows, 4 layers, d = 256; for an
    accelerator, never run.
  paper_10_layers: the same with 10 layers, d = 512: the paper's text and its
    figure 3 disagree. Jet blocks in place of Gated DeltaNet. Never run.
A comma adds a baseline of `sleep_jax/baselines.py`: `:pocket,deeper`.
T is the paper's 360 = 4 windows of 75 and 60 places for at most 10 questions,
each of which reads [9000 + k, name], and writes [answer marker, name].
"""

import dataclasses

from experiments import sizes
from sleep_jax.config import (
  DataConfig,
  ExperimentConfig,
  ModelConfig,
  OptimizerConfig,
  RunConfig,
  SleepConfig,
)
from sleep_jax.tasks.depo import DepoConfig


def pocket() -> ExperimentConfig:
  """attn -> GDN of width 64: cycles of up to 12 nodes, 8 questions.

  Names are one token, edges have separators, a cycle fits its window, and only
  powers of two are asked for: with less of this, one or two hops take more than
  minutes to learn.
  """
  return ExperimentConfig(
    task=DepoConfig(
      nodes=12,
      hops=8,
      train_hops=(1, 2, 4, 8),
      queries=8,
      name_length=(1, 1),
      mini_vocab=12,
      separator=True,
    ),
    model=ModelConfig(pattern=((("attn", "gdn"), 1),), width=64),
    sleep=SleepConfig(passes=4, window_length=36),
    data=DataConfig(length=72, batch_size=32),
    optimizer=sizes.SHALLOW_OPTIMIZER,
    run=RunConfig(
      steps=3000,
      evaluate_every=500,
      checkpoint_every=500,
      log_every=50,
      evaluation_examples=1024,
    ),
  )


def deep() -> ExperimentConfig:
  """8 hops, asked for as often as all others together.

  In the later half of training, which is 3,000 batches of 32, all cycles are
  full and the rates decay. Shorter cycles are the way in, but 8 hops are fewer
  there: in a cycle of 7 nodes one.
  """
  config = pocket()
  return dataclasses.replace(
    config,
    task=dataclasses.replace(
      config.task,
      train_hops=(1, 2, 4, 8, 8, 8),
      full_cycles=1.0,
      curriculum=((96_000, 0.5),),
    ),
    optimizer=dataclasses.replace(config.optimizer, decay_fraction=0.5),
    run=dataclasses.replace(config.run, steps=6000),
  )


def tiny() -> ExperimentConfig:
  """Everything that pocket does, in seconds."""
  config = pocket()
  return dataclasses.replace(
    config,
    task=dataclasses.replace(
      config.task, nodes=6, hops=2, train_hops=(1, 2), queries=2
    ),
    model=dataclasses.replace(
      config.model,
      width=32,
      mlp_width=64,
      key_dim=16,
      value_dim=16,
    ),
    sleep=dataclasses.replace(config.sleep, passes=2, window_length=12),
    data=dataclasses.replace(config.data, length=36, batch_size=16),
    run=sizes.TINY_RUN,
  )


def paper() -> ExperimentConfig:
  """The paper's Depo: batch 128, Muon 2e-3, AdamW 5e-5, 100k steps."""
  return ExperimentConfig(
    task=DepoConfig(),
    model=ModelConfig(
      pattern=((("attn", "gdn"), 2),),
      width=256,
      fast_weight_heads=4,
      key_dim=48,
      value_dim=96,
      mlp_width=1024,
    ),
    sleep=SleepConfig(passes=4, window_length=75),
    data=DataConfig(length=360, batch_size=128),
    optimizer=OptimizerConfig(),
    run=RunConfig(
      steps=100_000,
      evaluate_every=2000,
      checkpoint_every=2000,
      evaluation_examples=1024,
    ),
  )


def paper_10_layers() -> ExperimentConfig:
  """`paper` with the layers and the width that the paper's text names."""
  config = paper()
  return dataclasses.replace(
    config,
    model=dataclasses.replace(
      config.model,
      pattern=((("attn", "jet"), 5),),
      width=512,
      attention_heads=8,
      key_value_heads=8,
      fast_weight_heads=8,
      mlp_width=2048,
    ),
  )


SIZES = {
  "pocket": pocket,
  "deep": deep,
  "tiny": tiny,
  "paper": paper,
  "paper_10_layers": paper_10_layers,
}


def get_config(selection: str = "pocket"):
  """The config of "SIZE" or "SIZE,BASELINE", as a `ConfigDict`."""
  return sizes.select(SIZES, selection)
