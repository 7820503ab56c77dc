"""Muon for matrices, AdamW for the rest, one warmup-stable-decay schedule."""

import functools
import re

import jax
import jax.numpy as jnp
import optax

from sleep_jax.array_types import by_name
from sleep_jax.parallel import sharding

# Both from the settings that the paper follows (McLeish et al.).
ADAMW_BETAS = (0.9, 0.95)
FINAL_RATE = 1e-3  # of the peak


def learns(params, trainable: str):
  """A tree of bools: which parameters `optimizer.trainable` finds.

  Raises:
    ValueError: none.
  """
  found = [bool(re.search(trainable, name)) for name in by_name(params)]
  if not any(found):
    raise ValueError(
      f"optimizer.trainable, or first_stage's, is {trainable!r}: it finds no "
      "parameter, as group_0/attn_0/mixer/q_proj/kernel is one"
    )
  return jax.tree.unflatten(jax.tree.structure(params), found)


def check_stages(params, config) -> None:
  """ValueError where nothing would learn in a stage of an ExperimentConfig."""
  first = config.at_step(1).optimizer.trainable
  always = learns(params, config.optimizer.trainable)
  both = jax.tree.map(lambda x, y: x and y, learns(params, first), always)
  if not any(jax.tree.leaves(both)):
    raise ValueError(
      f"first_stage.trainable = {first!r}: nothing that it finds is found by "
      f"optimizer.trainable = {config.optimizer.trainable!r}"
    )


def only(tree, trainable: str):
  """`tree`, like parameters, with zeros for what does not learn."""
  return jax.tree.map(
    lambda x, learns: x if learns else jnp.zeros_like(x),
    tree,
    learns(tree, trainable),
  )


def labels(params, trainable: str = ""):
  """A tree of "muon", "adamw" and "frozen": who updates which parameter.

  Muon takes the kernels of the linear layers inside blocks (`*_proj`). AdamW
  takes the embedding, the head, norms, biases, A_log, dt_bias and the depthwise
  convolutions, which are no matrices: each channel has taps of its own.
  """

  def label(path, learns):
    if not learns:
      return "frozen"
    layer, name = (entry.key for entry in path[-2:])
    matrix = layer.endswith("_proj") and name == "kernel"
    return "muon" if matrix else "adamw"

  return jax.tree_util.tree_map_with_path(label, learns(params, trainable))


def schedule(config, steps: int):
  """Step -> multiplier: linear warm-up, constant, cosine to FINAL_RATE."""
  warmup = round(config.warmup_fraction * steps)
  decay = min(round(config.decay_fraction * steps), steps - warmup)
  return optax.join_schedules(
    [
      optax.linear_schedule(1 / (warmup + 1), 1.0, warmup),
      optax.constant_schedule(1.0),
      optax.cosine_decay_schedule(1.0, max(decay, 1), FINAL_RATE),
    ],
    [warmup, steps - decay],
  )


def stack_equal_shapes(inner):
  """`inner`, run over one array for all leaves [R, in, out] of equal shape.

  Newton-Schulz iterations on dozens of separate matrices make a large graph
  that compiles slowly; stacked, there is one for each shape, and one for each
  of the two ways that matrices are cut (`sharding.RULES`). On a mesh each
  device takes whole matrices: iterations on cut ones would gather them all.
  """

  def name(path, leaf):
    way = "from" if path[-2].key in ("o_proj", "down_proj") else "to"
    return f"{way} {leaf.shape[1:]}"

  def stack(tree):
    groups = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
      groups.setdefault(name(path, leaf), []).append(leaf)
    return {name: jnp.concatenate(group) for name, group in groups.items()}

  def unstack(stacked, tree):
    leaves, structure = jax.tree.flatten_with_path(tree)
    taken, out = dict.fromkeys(stacked, 0), []
    for path, leaf in leaves:
      group = name(path, leaf)
      start = taken[group]
      taken[group] = start + leaf.shape[0]
      out.append(stacked[group][start : taken[group]])
    return jax.tree.unflatten(structure, out)

  def spread(tree):
    return jax.tree.map(
      lambda x: sharding.spread(x) if isinstance(x, dict) else x,
      tree,
      is_leaf=lambda x: isinstance(x, dict),
    )

  def init(params):
    return inner.init(stack(params))

  def update(updates, state, params=None):
    del params
    stacked = stack(updates)
    new = inner.update(spread(stacked), spread(state))
    stacked, state = jax.tree.map(
      lambda x, like: sharding.unspread(x, like) if isinstance(x, dict) else x,
      new,
      (stacked, state),
      is_leaf=lambda x: isinstance(x, dict),
    )
    return unstack(stacked, updates), state

  return optax.GradientTransformation(init, update)


def muon_dimensions(stacked):
  """Matrices [batch, in, out]: in is summed over, out is written to."""
  return jax.tree.map(
    lambda _: optax.contrib.MuonDimensionNumbers(1, 2), stacked
  )


def scale_by_shape(updates, _):
  """The released Muon's factor for [batch, in, out]: sqrt(max(1, out / in))."""
  return jax.tree.map(
    lambda x: max(1.0, x.shape[2] / x.shape[1]) ** 0.5 * x, updates
  )


def optimizer(config, steps: int) -> optax.GradientTransformation:
  """The whole update of an `OptimizerConfig` over `steps` steps.

  What is not trained has no optimizer state.
  """
  multiplier = schedule(config, steps)

  def rate(peak):
    return lambda step: peak * multiplier(step)

  muon = optax.chain(
    stack_equal_shapes(
      optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=muon_dimensions),
        optax.stateless(scale_by_shape),
      )
    ),
    optax.add_decayed_weights(config.weight_decay),
    optax.scale_by_learning_rate(rate(config.muon_learning_rate)),
  )
  adamw = optax.adamw(
    rate(config.adamw_learning_rate),
    *ADAMW_BETAS,
    weight_decay=config.weight_decay,
    mask=decayed,
  )
  whole = optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.partition(
      {"muon": muon, "adamw": adamw, "frozen": optax.set_to_zero()},
      functools.partial(labels, trainable=config.trainable),
    ),
  )
  if config.skipped_steps:
    return optax.apply_if_finite(whole, config.skipped_steps)
  return whole


def decayed(params):
  """True for embeddings and kernels; norms, A_log and dt_bias keep theirs."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key in ("embedding", "kernel"), params
  )
