"""What sleep is compared with: configs of models that do not sleep, N = 1.

Three are the model without sleep, or without fast weights; three more spend
on training what sleep spends, on depth, on width or on more steps:

  python -m experiments.main --config=experiments/automaton.py:pocket,deeper

Rows of tokens, the optimizer and all that a function does not name stay the
given config's.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sleep_jax.config import ATTENTION, ExperimentConfig
from sleep_jax.data.source import task_and_tokenizer, vocabulary_size
from sleep_jax.flops import Flops, count_flops
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.training import optimizers
from sleep_jax.training.step import (
  abstract_batch,
  abstract_state,
  make_train_step,
)

# Largest relative difference in training FLOPs of what is called matched.
TOLERANCE = 0.02
# A search ends this close; the next integer may be no closer.
_CLOSE = TOLERANCE / 10


def train_step_flops(config: ExperimentConfig, vocabulary_size: int) -> Flops:
  """Of one optimizer step, as `count_flops` counts; the same on any machine.

  The gated delta rule counts by its portable form, whatever kernel would run.
  The head counts in every window (see `rollout`), also where no row of a batch
  predicts and it is left out.

  Args:
    vocabulary_size: of the config's tokenizer.
  """
  config = dataclasses.replace(config, model=config.model.portable())
  model = HybridLM(config.model, vocabulary_size)
  optimizer = optimizers.optimizer(config.optimizer, max(config.run.steps, 1))
  state = abstract_state(model, optimizer, config)
  step = make_train_step(model, optimizer, config)
  passes = jax.ShapeDtypeStruct((), jnp.int32)
  return count_flops(step, state, abstract_batch(config), passes)


def training_flops(config: ExperimentConfig) -> int:
  """Of all optimizer steps of a run; judging and evaluations not included.

  The steps of a first stage count as the others do.

  Raises:
    ValueError: the task or the tokenizer cannot be made.
  """
  _, tokenizer = task_and_tokenizer(config)
  size = vocabulary_size(config, tokenizer)
  return config.run.steps * train_step_flops(config, size).total


_ONE_PASS: Mapping[str, Any] = dict(passes=1, pass_loss=0.0)


def hybrid(config: ExperimentConfig) -> ExperimentConfig:
  """The same model with one pass over each window: N = 1."""
  return _replace(config, sleep=_ONE_PASS)


def transformer(config: ExperimentConfig) -> ExperimentConfig:
  """Attention in place of fast weights, N = 1, evicted as before.

  Nothing survives an eviction: what the best guess without memory scores.
  """
  pattern = tuple(
    (
      tuple(
        kind if kind in ATTENTION else "attn"
        for kind in kinds
        if kind != "inserted_jet"
      ),
      repeats,
    )
    for kinds, repeats in config.model.pattern
  )
  return _replace(config, model=dict(pattern=pattern), sleep=_ONE_PASS)


def full_cache(config: ExperimentConfig) -> ExperimentConfig:
  """The transformer that evicts nothing: one window holds the whole row.

  The upper reference. Rows are laid out as for the given config.
  """
  never = dict(evaluation_passes=(), tolerance=0.0, sampled_passes=False)
  return _replace(transformer(config), sleep=dict(eviction="none", **never))


def deeper(config: ExperimentConfig) -> ExperimentConfig:
  """N = 1, the pattern repeated until training costs the same.

  `mlp_width` makes up for what whole repeats cannot.

  Raises:
    ValueError: no repeats and mlp_width cost the same to within TOLERANCE.
  """
  cost = _cost(config)

  def repeated(factor):
    pattern = tuple(
      (kinds, factor * repeats) for kinds, repeats in config.model.pattern
    )
    return _replace(hybrid(config), model=dict(pattern=pattern))

  factor = _nearest(lambda x: cost(repeated(x)), cost(config), 1)
  return _matched(config, _with_mlp_width(repeated(factor), config, cost), cost)


def wider(config: ExperimentConfig) -> ExperimentConfig:
  """N = 1, all widths and head sizes scaled until training costs the same.

  Counts of heads stay. `mlp_width` makes up for what `width`, a multiple of
  2 x attention_heads, cannot.

  Raises:
    ValueError: no width and mlp_width cost the same to within TOLERANCE.
  """
  cost, model = _cost(config), config.model
  unit = 2 * model.attention_heads

  def scaled(units):
    width = units * unit
    sizes = {
      name: max(1, round(getattr(model, name) * width / model.width))
      for name in ("key_dim", "value_dim", "mlp_width")
    }
    return _replace(hybrid(config), model=dict(width=width, **sizes))

  units = _nearest(lambda x: cost(scaled(x)), cost(config), model.width // unit)
  return _matched(config, _with_mlp_width(scaled(units), config, cost), cost)


def longer(config: ExperimentConfig) -> ExperimentConfig:
  """N = 1, trained for as many more steps as cost the same.

  It sees more rows than any other. The schedule stretches with the steps; a
  task's curriculum, which counts examples, does not.

  Raises:
    ValueError: no number of steps costs the same to within TOLERANCE.
  """
  cost, once = _cost(config), hybrid(config)
  each = cost(once) / max(once.run.steps, 1)
  steps = round(cost(config) / each)
  return _matched(config, _replace(once, run=dict(steps=steps)), cost)


BASELINES: dict[str, Callable[[ExperimentConfig], ExperimentConfig]] = {
  baseline.__name__: baseline
  for baseline in (transformer, full_cache, hybrid, deeper, wider, longer)
}


def _replace(config: ExperimentConfig, **sections) -> ExperimentConfig:
  """The config with some leaves of some sections changed."""
  return dataclasses.replace(
    config,
    **{
      name: dataclasses.replace(getattr(config, name), **leaves)
      for name, leaves in sections.items()
    },
  )


def _cost(config: ExperimentConfig) -> Callable[[ExperimentConfig], int]:
  """`training_flops` of variants of a config, each counted once.

  Raises:
    ValueError: the config does not train at all.
  """
  if config.run.steps < 1:
    raise ValueError(
      f"run.steps = {config.run.steps}: without training there are no FLOPs "
      "to match; set it to at least 1"
    )
  _, tokenizer = task_and_tokenizer(config)
  counted: dict = {}

  def cost(variant):
    # What costs: a step of another seed or of a longer run costs the same.
    key = variant.model, variant.sleep
    if key not in counted:
      size = vocabulary_size(variant, tokenizer)
      flops = train_step_flops(variant, size)
      counted[key] = flops.total
    return variant.run.steps * counted[key]

  return cost


def _nearest(cost: Callable[[int], int], target: int, start: int) -> int:
  """The integer from 1 on whose rising cost is nearest the target.

  Or the first one found that is close: each cost takes a trace of seconds. So
  the interval is cut where a straight line through its ends meets the target,
  and next in its middle, so that it shrinks whatever the curve.
  """
  low, high = 1, max(start, 2)
  while cost(high) < target:
    low, high = high, 2 * high
  by_line = True
  while high - low > 1:
    if best := [x for x in (low, high) if abs(cost(x) / target - 1) < _CLOSE]:
      return best[0]
    rise = (target - cost(low)) / (cost(high) - cost(low))
    guess = round(low + (rise if by_line else 0.5) * (high - low))
    middle = min(max(guess, low + 1), high - 1)
    low, high = (middle, high) if cost(middle) < target else (low, middle)
    by_line = not by_line
  return min((low, high), key=lambda x: abs(cost(x) - target))


def _with_mlp_width(variant, config, cost) -> ExperimentConfig:
  """The variant with the mlp_width at which it costs what the config costs."""

  def with_width(width):
    return _replace(variant, model=dict(mlp_width=width))

  start = variant.model.mlp_width
  return with_width(
    _nearest(lambda x: cost(with_width(x)), cost(config), start)
  )


def _matched(config, variant, cost) -> ExperimentConfig:
  """The variant, if it costs what the config costs; else ValueError."""
  target, got = cost(config), cost(variant)
  if abs(got / target - 1) > TOLERANCE:
    raise ValueError(
      f"training takes {target:.4g} FLOPs, and the nearest baseline, with "
      f"model.pattern = {variant.model.pattern}, width = "
      f"{variant.model.width}, mlp_width = {variant.model.mlp_width} and "
      f"run.steps = {variant.run.steps}, {got:.4g}: not within "
      f"{TOLERANCE:.0%}; match another way, or change N or the sizes"
    )
  return variant
