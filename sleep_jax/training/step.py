"""One optimizer step, and the predictions of a batch, as jitted functions."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from sleep_jax.config import ExperimentConfig
from sleep_jax.data.pipeline import Batch
from sleep_jax.flops import count_flops
from sleep_jax.model.fast_weights import init_fast_weights
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.parallel import sharding
from sleep_jax.parallel.sharding import ROWS, constrain, constrain_like
from sleep_jax.rollout import Rollout, rollout
from sleep_jax.sleep import Slept, row_norm, sleep, sleep_until
from sleep_jax.training import optimizers
from sleep_jax.training.checkpoints import restore_params


class TrainState(NamedTuple):
  """Parameters and optimizer state; float32 whatever the compute dtype."""

  params: Any
  optimizer: optax.OptState


def abstract_batch(config: ExperimentConfig) -> Batch:
  """A `jax.ShapeDtypeStruct` for each array of a training batch."""
  rows = config.data.batch_size, config.data.length
  ids: Any = jax.ShapeDtypeStruct(rows, jnp.int32)
  mask: Any = jax.ShapeDtypeStruct(rows, jnp.bool_)
  label: Any = jax.ShapeDtypeStruct(rows[:1], jnp.int32)
  held: Any = None
  if config.sleep.pass_loss:
    held = (rows[0], config.sleep.passes, rows[1])
    held = jax.ShapeDtypeStruct(held, jnp.int32)
  return Batch(ids, ids, mask, mask, label, label, held)


def abstract_state(
  model: HybridLM,
  optimizer: optax.GradientTransformation,
  config: ExperimentConfig,
  mesh: Mesh | None = None,
) -> TrainState:
  """A `jax.ShapeDtypeStruct` for each array of a state, laid over the mesh.

  Raises:
    ValueError: a rule of `mesh.rules` finds no parameter.
  """
  params = jax.eval_shape(functools.partial(init_params, model, 0))
  state = TrainState(params, jax.eval_shape(optimizer.init, params))
  if mesh is None:
    return state
  sharding.check_rules(params, config.mesh.rules)
  laid_out = sharding.shardings(mesh, state, config.mesh.rules)
  return jax.tree.map(
    lambda x, its: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=its),
    state,
    laid_out,
  )


def init_state(
  model: HybridLM,
  optimizer: optax.GradientTransformation,
  config: ExperimentConfig,
  mesh: Mesh,
) -> TrainState:
  """The state before the first step, made where it will be held.

  Raises:
    ValueError: `mesh.rules` or `run.init_from` cannot be used.
  """
  like = abstract_state(model, optimizer, config, mesh)
  places = jax.tree.map(lambda x: x.sharding, like)
  if config.run.init_from:
    params = restore_params(config.run.init_from, like.params)
  else:
    make = functools.partial(init_params, model, config.run.seed)
    params = jax.jit(make, out_shardings=places.params)()
  init = jax.jit(optimizer.init, out_shardings=places.optimizer)
  return TrainState(params, init(params))


def init_params(model: HybridLM, seed: int):
  """Fresh parameters, from the seed alone."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  return jax.jit(model.init)(
    jax.random.key(seed),
    tokens,
    init_fast_weights(model.config, 1),
    jnp.ones((1, 1), bool),
  )["params"]


class Prediction(NamedTuple):
  """What a model does with a batch: see `Rollout`."""

  loss_sum: jax.Array
  predictions: jax.Array
  slept: Slept | None


def draw_passes(config: ExperimentConfig, step: int) -> np.int32:
  """N, or the number of passes drawn for a step where they are sampled."""
  most = config.sleep.passes
  if not config.sleep.sampled_passes:
    return np.int32(most)
  draw = np.random.default_rng((config.run.seed, step))
  return draw.integers(1, most, endpoint=True, dtype=np.int32)


def run(
  model: HybridLM, config: ExperimentConfig, params, batch, **options
) -> Rollout:
  """The rollout of a batch under the config's sleep."""
  return rollout(
    model,
    params,
    batch.inputs,
    batch.targets,
    batch.loss_mask,
    batch.valid,
    config.sleep,
    answer_length=config.data.answer_length,
    pass_targets=batch.pass_targets,
    **options,
  )


def total_loss(config: ExperimentConfig, result: Rollout, batch: Batch):
  """What is differentiated, summed over the batch's masked places.

  With `sleep.pass_loss` a row's mean over places and passes counts as often as
  its masked places, times that weight.
  """
  targets, pass_loss = batch.pass_targets, result.pass_loss
  if targets is None or pass_loss is None:
    return result.loss_sum
  means = pass_loss / jnp.maximum(jnp.sum(targets >= 0, axis=(1, 2)), 1)
  answers = jnp.sum(batch.loss_mask, axis=1)
  return result.loss_sum + config.sleep.pass_loss * jnp.sum(means * answers)


def model_flops(
  model: HybridLM, config: ExperimentConfig, params, batch: Batch
) -> int | None:
  """Of a step, as utilization is reckoned: thrice a forward pass's products.

  What is computed again for the gradient does not count. All N passes do, and
  the head in every window, as in `count_flops`. None where that cannot count.
  """

  portable = model.clone(config=model.config.portable())

  def loss(params, batch):
    return total_loss(config, run(portable, config, params, batch), batch)

  try:
    return 3 * count_flops(loss, params, batch).products
  except ValueError as error:
    logging.debug("no model_flops_per_second: %s", error)
    return None


def answer_starts(loss_mask):
  """The first place of each answer [B, T]: of each run of masked places."""
  return loss_mask & ~jnp.pad(loss_mask, ((0, 0), (1, 0)))[:, :-1]


def count_exact(predictions, targets, loss_mask):
  """How many answers have all their places predicted."""
  starts = answer_starts(loss_mask)
  wrong = (predictions != targets) & loss_mask
  errors = jnp.cumsum(wrong, axis=1)
  # Errors of a row before the answer that a place is in.
  before = jax.lax.cummax(jnp.where(starts, errors - wrong, 0), axis=1)
  first_errors = wrong & (errors == before + 1)
  return jnp.sum(starts) - jnp.sum(first_errors)


def make_train_step(
  model: HybridLM,
  optimizer: optax.GradientTransformation,
  config: ExperimentConfig,
):
  """(state, batch, passes) -> (state, metrics), jitted.

  The old state is consumed; `passes` are those of `draw_passes`. Under a config
  of `ExperimentConfig.at_step` only what this trains is changed, whatever the
  optimizer, which is that of the whole run, would do.

  The loss is the mean cross-entropy (nats) over the batch's masked places,
  also where the batch is cut into `optimizer.accumulation_steps` parts; the
  gradient is that of `total_loss` over as many places. The metrics are scalars
  on the device: loss and share of exact answers, norms of
  the gradient, of the new parameters and of a row's last S (the mean), and
  "bad_leaf": the first leaf, of the gradient and then of the new parameters,
  whose norm is not finite; -1 if all are. With `optimizer.skipped_steps`, also
  the steps skipped so far, and in a row.
  """
  parts = config.optimizer.accumulation_steps

  def laid_out(tree):
    return constrain_like(tree, config.mesh.rules)

  def loss_of(params, part, passes):
    # None: those of the config, or what each row's pass targets say.
    drawn = passes if config.sleep.sampled_passes else None
    result = run(model, config, params, part, passes=drawn)
    right = count_exact(result.predictions, part.targets, part.loss_mask)
    norms = row_norm(result.memory.state, part.inputs.shape[0])
    return total_loss(config, result, part), (
      result.loss_sum,
      right.astype(jnp.int32),
      jnp.sum(norms).astype(result.loss_sum.dtype),
    )

  def accumulate(params, batch, passes):
    """Gradients, loss, exact answers and norms of S, summed over the batch."""
    grad = jax.grad(loss_of, has_aux=True)

    def add(totals, part):
      gradients, sums = grad(params, part, passes)
      more = laid_out(gradients), *sums
      return jax.tree.map(jnp.add, totals, more), None

    # Of neighbouring rows, which one device has, each part gets one.
    cut = jax.tree.map(
      lambda x: constrain(
        jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), None, ROWS
      ),
      batch,
    )
    zeros = laid_out(jax.tree.map(jnp.zeros_like, params))
    zero = jnp.zeros((), jax.tree.leaves(params)[0].dtype)
    totals = zeros, zero, jnp.zeros((), jnp.int32), zero
    return jax.lax.scan(add, totals, cut)[0]

  def train_step(state: TrainState, batch: Batch, passes):
    gradients, loss, right, norms = accumulate(state.params, batch, passes)
    count, rows = jnp.sum(batch.loss_mask), batch.inputs.shape[0]
    trainable = config.optimizer.trainable
    gradients = jax.tree.map(lambda x: x / count, gradients)
    gradients = optimizers.only(gradients, trainable)
    with jax.named_scope("optimizer"):
      updates, new = optimizer.update(gradients, state.optimizer, state.params)
      updates = optimizers.only(updates, trainable)
      params = optax.apply_updates(state.params, updates)
    optimizer_state: Any = new
    # Of the gradient's leaves, then of the new parameters'.
    squares = jnp.stack(
      [jnp.sum(jnp.square(x)) for x in jax.tree.leaves((gradients, params))]
    )
    of_gradient, of_params = jnp.split(squares, 2)
    bad = ~jnp.isfinite(squares)
    metrics = {
      "loss": loss / count,
      "accuracy": right / jnp.sum(answer_starts(batch.loss_mask)),
      "grad_norm": jnp.sqrt(jnp.sum(of_gradient)),
      "param_norm": jnp.sqrt(jnp.sum(of_params)),
      "state_norm": norms / rows,
      "bad_leaf": jnp.where(jnp.any(bad), jnp.argmax(bad), -1),
    }
    if config.optimizer.skipped_steps:
      metrics["skipped_steps"] = optimizer_state.total_notfinite
      metrics["skipped_in_a_row"] = optimizer_state.notfinite_count
    return laid_out(TrainState(params, optimizer_state)), metrics

  return jax.jit(train_step, donate_argnums=0)


def make_predict(model: HybridLM, config: ExperimentConfig):
  """(params, batch, passes) -> `Prediction`, jitted.

  `passes` is at most the largest of N and `sleep.evaluation_passes`.
  """
  most = max((config.sleep.passes, *config.sleep.evaluation_passes))
  watched = (
    config.run.log_passes
    or config.sleep.tolerance > 0
    or config.sleep.evaluation_passes
  )

  def predict(params, batch: Batch, passes) -> Prediction:
    result = run(
      model,
      config,
      params,
      batch,
      passes=passes,
      most_passes=most,
      sleeper=sleep_until if watched else sleep,
    )
    return Prediction(result.loss_sum, result.predictions, result.slept)

  return jax.jit(predict)
