"""What the sizes of all experiments share."""

import dataclasses
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
# For two blocks alone and batches of 32 or 64: twice that.
SHALLOW_OPTIMIZER = dataclasses.replace(
  POCKET_OPTIMIZER, muon_learning_rate=1e-2, adamw_learning_rate=4e-3
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
  sizes: Mapping[str, Callable[[], ExperimentConfig]],
  selection: str,
  variants: Mapping[str, Callable[[ExperimentConfig], ExperimentConfig]] = {},
) -> ml_collections.ConfigDict:
  """The config of "SIZE" or "SIZE,VARIANT,...", variants applied in order.

  Variants are those given and `sleep_jax.baselines`.

  Overrides of the command line come after: they change the result, and what a
  variant has matched is not matched anew.

  Raises:
    ValueError: a size or a variant that does not exist, with those that do; a
      variant that cannot be made.
  """
  size, *names = selection.split(",")
  if size not in sizes:
    raise ValueError(f"unknown size {size!r}: one of {sorted(sizes)}")
  config = sizes[size]()
  if names:
    # Not above: a mistyped size should not wait for the model's imports.
    from sleep_jax.baselines import BASELINES

    known = {**variants, **BASELINES}
    for name in names:
      if name not in known:
        raise ValueError(f"unknown variant {name!r}: one of {list(known)}")
    for name in names:
      config = known[name](config)
  return to_config_dict(config)
