"""Rule 110 with sleep.

  python -m experiments.main --config=experiments/automaton.py

Strings of bits are read, one window each, and evicted; then the first bit of
each after t steps of Rule 110 is asked (paper, section 5). Sizes:
  pocket (default): 2 strings of 16 bits, t = 4, strings held out; minutes on
    2 CPU cores.
  deep: the same at t = 8, which the answers alone do not teach in as many
    tokens: each pass is told to make two updates, and t and N grow together.
  tiny: seconds, and the time to compile, for tests; learns nothing much.
  paper: 4 strings of 24 bits, t = 32, d = 256, 4 layers; for an accelerator.
A comma adds a baseline of `sleep_jax/baselines.py`: `:pocket,deeper`.
T counts the answer marker, the labels, and the end token after them: the
paper's 100 tokens and one more.
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
from sleep_jax.tasks.rule110 import Rule110Config


def pocket() -> ExperimentConfig:
  """attn -> GDN of width 64: the smallest hybrid that shows the effect."""
  return ExperimentConfig(
    task=Rule110Config(width=16, strings=2, steps=4),
    model=ModelConfig(pattern=((("attn", "gdn"), 1),), width=64),
    sleep=SleepConfig(passes=4, window_length=16),
    data=DataConfig(length=35, batch_size=128),
    optimizer=sizes.POCKET_OPTIMIZER,
    run=RunConfig(
      steps=500, evaluate_every=100, checkpoint_every=250, log_every=20
    ),
  )


def deep() -> ExperimentConfig:
  """t = 8 with N = 5, after t = 2 with N = 2, and so on.

  Each stage goes on with the t before it. Batches are small, as every place is
  a target.
  """
  config = pocket()
  return dataclasses.replace(
    config,
    task=dataclasses.replace(
      config.task,
      steps=8,
      pass_steps=2,
      curriculum=((22_400, 2), (22_400, (2, 4)), (19_200, (4, 6))),
    ),
    sleep=dataclasses.replace(config.sleep, passes=5, pass_loss=1.0),
    data=dataclasses.replace(config.data, batch_size=32),
    run=dataclasses.replace(config.run, steps=3000, evaluate_every=250),
  )


def tiny() -> ExperimentConfig:
  """Everything that pocket does, in seconds."""
  config = pocket()
  return dataclasses.replace(
    config,
    model=dataclasses.replace(
      config.model, width=32, mlp_width=64, key_dim=16, value_dim=16
    ),
    data=dataclasses.replace(config.data, batch_size=16),
    run=sizes.TINY_RUN,
  )


def paper() -> ExperimentConfig:
  """The paper's automaton: batch 512, Muon 2e-3, AdamW 5e-5, 98k steps."""
  return ExperimentConfig(
    task=Rule110Config(width=24, strings=4, steps=32),
    model=ModelConfig(
      pattern=((("attn", "gdn"), 2),),
      width=256,
      fast_weight_heads=4,
      key_dim=48,
      value_dim=96,
      mlp_width=1024,
    ),
    sleep=SleepConfig(passes=4, window_length=24),
    data=DataConfig(length=101, batch_size=512),
    optimizer=OptimizerConfig(),
    run=RunConfig(steps=98_000, evaluate_every=2000, checkpoint_every=2000),
  )


SIZES = {"pocket": pocket, "deep": deep, "tiny": tiny, "paper": paper}


def get_config(selection: str = "pocket"):
  """The config of "SIZE" or "SIZE,BASELINE", as a `ConfigDict`."""
  return sizes.select(SIZES, selection)
