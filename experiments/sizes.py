"""What the sizes of all experiments share."""

from collections.abc import Callable, Mapping

import ml_collections

from sleep_jax.config import (
  ExperimentConfig,
  OptimizerConfig,
  RunConfig,
  to_config_dict,
)

# From scratch on a small model: higher rates than the paper's, short decay.
POCKET_OPTIMIZER = OptimizerConfig(
  muon_learning_rate=5e-3,
  adamw_learning_rate=2e-3,
  warmup_fraction=0.02,
  decay_fraction=0.3,
)
# Everything that a run does, in seconds.
TINY_RUN = RunConfig(
  steps=20,
  evaluate_every=10,
  checkpoint_every=10,
  log_every=5,
  evaluation_examples=64,
  evaluation_batch_size=32,
)


def select(
  sizes: Mapping[str, Callable[[], ExperimentConfig]], size: str
) -> ml_collections.ConfigDict:
  """The config of a size; ValueError names the sizes when it is none."""
  if size not in sizes:
    raise ValueError(f"unknown size {size!r}: one of {sorted(sizes)}")
  return to_config_dict(sizes[size]())
