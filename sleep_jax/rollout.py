"""The wake/sleep schedule over a long sequence (paper, Algorithm 1)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sleep_jax.array_types import Mask, PassTargets, Tokens
from sleep_jax.config import SleepConfig
from sleep_jax.model import layers
from sleep_jax.model.fast_weights import init_fast_weights
from sleep_jax.model.places import EMPTY, init_cache, window
from sleep_jax.parallel.sharding import ROWS, constrain
from sleep_jax.sleep import Slept, sleep


class Memory(NamedTuple):
  """What survives a window's end.

  Attributes:
    state: fast weights, as `init_fast_weights`.
    cache: tokens kept by sliding eviction, as `init_cache`.
    cached: their positions, counted from the next window's start [B, L]; None
      under hard eviction.
  """

  state: Any
  cache: Any
  cached: jax.Array | None


class Rollout(NamedTuple):
  """What a rollout gives: sums of the loss, and predictions where it counts.

  Attributes:
    loss_sum: cross-entropy (nats) summed over the masked places.
    predictions: argmax token at the masked places, 0 elsewhere [B, T].
    memory: after the last window, which took one pass.
    slept: `Slept.passes` [windows, B] of the windows before the last, 0 where
      a row did not sleep, and of `sleep_until` also `Slept.norms` and `changes`
      [windows, N, B]; None where there is one window.
    pass_loss: cross-entropy (nats) of what was held after each pass, summed
      over windows, passes and places [B]; None without `pass_targets`.
  """

  loss_sum: jax.Array
  predictions: jax.Array
  memory: Memory
  slept: Any
  pass_loss: jax.Array | None = None


def init_memory(model, batch_size: int, sleep_config: SleepConfig) -> Memory:
  """What a row starts with: S = 0, and nothing kept."""
  sliding = sleep_config.eviction == "sliding"
  length = sleep_config.window_length if sliding else 0
  state = init_fast_weights(model.config, batch_size)
  cache = init_cache(
    model.config, batch_size, length, sleep_config.carry_convolution
  )
  return Memory(
    jax.tree.map(lambda x: constrain(x, None, ROWS, "tensor"), state),
    jax.tree.map(lambda x: constrain(x, None, ROWS), cache),
    jnp.full((batch_size, length), EMPTY, jnp.int32) if sliding else None,
  )


def run_window(
  model,
  params,
  tokens: Tokens,
  memory: Memory,
  valid: Mask,
  row_passes,
  passes: int,
  sleep_config: SleepConfig,
  sleeper=sleep,
) -> tuple[jax.Array, Memory, Slept]:
  """(h [B, L, D], memory after the window, `Slept` of the looped blocks).

  The blocks before the looped ones run once, the looped ones as often as
  `row_passes` [B] says (at most `passes`), those after them once on what the
  last pass gave: they see of the window what the last pass made of it.
  """
  first, last = sleep_config.looped_groups or (0, len(model.config.pattern))
  places = window(valid, sleep_config.window_length, memory.cached)
  before, looped, after = (
    slice(0, first),
    slice(first, last),
    slice(last, None),
  )
  h = constrain(model.apply({"params": params}, tokens, method="embed"), ROWS)
  state, cache = [], []

  def once(h, groups):
    if not memory.state[groups]:
      return h
    h, new_state, new_cache = model.apply(
      {"params": params},
      *(h, memory.state[groups], memory.cache[groups], places, groups),
      method="blocks",
    )
    state.extend(new_state)
    cache.extend(new_cache)
    return h

  h = once(h, before)
  slept = sleeper(
    model,
    params,
    h,
    memory.state[looped],
    memory.cache[looped],
    places,
    row_passes,
    passes,
    sleep_config,
    looped,
  )
  state.extend(slept.state)
  cache.extend(slept.cache)
  h = once(slept.h, after)
  cached = memory.cached
  if cached is not None and places.replaces_cache:
    cached = places.kept()
  return h, Memory(tuple(state), tuple(cache), cached), slept


def rollout(
  model,
  params,
  inputs: Tokens,
  targets: Tokens,
  loss_mask: Mask,
  valid: Mask,
  sleep_config: SleepConfig,
  *,
  passes=None,
  most_passes: int | None = None,
  sleeper=sleep,
  answer_length: int = 0,
  pass_targets: PassTargets | None = None,
) -> Rollout:
  """Runs a batch window by window and returns its `Rollout`.

  Rows are cut into windows of L tokens and what remains. In a window without
  loss a row sleeps, in one with loss it is awake and takes one pass: each row
  by its own mask. Between windows h is dropped; S alone goes on (hard
  eviction), or S and the last L - 1 tokens (sliding), and alone carry the
  gradient. The last window takes one pass for every row: nothing comes after it
  that could profit.

  The gradient stops where the last `sleep.gradient_windows` windows begin: what
  comes before, loss included, counts as a constant.

  The windows before the last are one `lax.scan`, the passes another, the
  repeats of the model's pattern a third: compile time does not grow with them.

  Args:
    model: a `HybridLM`.
    params: its parameters.
    inputs, targets: token ids [B, T]; the prediction part of a row has inputs
      [marker, y0, y1, ...] and targets [y0, y1, ...], or several such, each
      after its prompt.
    loss_mask: where a target counts.
    valid: False where a place is padding.
    sleep_config: how and when to sleep.
    passes: of a sleeping row, a number that may be traced; None is N. What
      `pass_targets` say of a row's passes goes before it.
    most_passes: what `passes` cannot exceed; None is N.
    sleeper: `sleep`, or `sleep_until` where no gradient is wanted.
    answer_length: most places of a row with loss; 0 is any number. Others of a
      window get no logits.
    pass_targets: what the head is to read in h after each pass [B, N, T], -1
      where that is left open, as where a row is awake; with `sleep.pass_loss`.
      A row sleeps from the first pass of which it says something.
  """
  most_passes = most_passes or sleep_config.passes
  passes = most_passes if passes is None else passes
  batch, length = inputs.shape
  _, dtype = layers.dtypes(model.config)

  def judge(params, h, targets, mask):
    if 0 < answer_length < mask.shape[1]:
      # The masked places of each row, and some others where they are fewer.
      _, places = jax.lax.top_k(mask.astype(jnp.int32), answer_length)
      nats, predictions = judge_all(
        params,
        jnp.take_along_axis(h, places[..., None], axis=1),
        *(jnp.take_along_axis(x, places, axis=1) for x in (targets, mask)),
      )
      none = jnp.zeros_like(targets)
      return nats, jnp.put_along_axis(
        none, places, predictions, axis=1, inplace=False
      )
    return judge_all(params, h, targets, mask)

  def judge_all(params, h, targets, mask):
    logits = model.apply({"params": params}, h, method="logits")
    log_probabilities = jax.nn.log_softmax(logits)
    nats = -jnp.take_along_axis(log_probabilities, targets[..., None], -1)
    predictions = jnp.argmax(logits, axis=-1).astype(targets.dtype)
    return jnp.sum(nats[..., 0] * mask), jnp.where(mask, predictions, 0)

  def judge_passes(params, each, targets):
    if targets is None:
      return None

    def judge_pass(total, pass_):
      h, targets = pass_
      logits = model.apply({"params": params}, h, method="logits")
      log_probabilities = jax.nn.log_softmax(logits)
      said = jnp.maximum(targets, 0)[..., None]
      nats = -jnp.take_along_axis(log_probabilities, said, -1)[..., 0]
      return total + jnp.sum(nats * (targets >= 0), axis=1), None

    judge_pass = jax.checkpoint(judge_pass, prevent_cse=False)
    passes = each, jnp.moveaxis(targets, 1, 0)
    return jax.lax.scan(judge_pass, jnp.zeros(batch, dtype), passes)[0]

  def one_window(params, memory, window, passes, most_passes, config):
    inputs, targets, mask, valid, held = window
    awake = jnp.any(mask, axis=1)
    row_passes = jnp.where(awake, 1, passes).astype(jnp.int32)
    h, memory, slept = run_window(
      model,
      params,
      inputs,
      memory,
      valid,
      row_passes,
      most_passes,
      config,
      sleeper,
    )
    # Most windows hold no loss at all; their logits are not computed.
    judged = jax.lax.cond(
      jnp.any(mask),
      judge,
      lambda params, h, targets, mask: (
        jnp.zeros((), dtype),
        jnp.zeros_like(targets),
      ),
      params,
      h,
      targets,
      mask,
    )
    pass_loss = judge_passes(params, slept.each, held)
    slept = slept._replace(h=None, state=None, cache=None, each=None)
    sleeps = ~awake & jnp.any(valid, axis=1)
    slept = jax.tree.map(lambda x: jnp.where(sleeps, x, 0), slept)
    return memory, (*judged, slept, pass_loss)

  if pass_targets is None:
    sleep_config = dataclasses.replace(sleep_config, pass_loss=0.0)
  else:
    told = jnp.any(pass_targets >= 0, axis=2)
    passes = most_passes - jnp.argmax(told, axis=1)
  if sleep_config.eviction == "none":
    window_length = length
    config = dataclasses.replace(sleep_config, window_length=length)
  else:
    window_length = sleep_config.window_length
    config = sleep_config
  before = (length - 1) // window_length
  split = before * window_length

  def windows(x):
    x = x[..., :split]
    x = x.reshape(*x.shape[:-1], before, window_length)
    return jnp.moveaxis(x, -2, 0)

  arrays = (inputs, targets, loss_mask, valid)
  many = jax.tree.map(windows, (*arrays, pass_targets))

  def scan(params, memory, first, last):
    def body(memory, window):
      with jax.named_scope("sleep"):
        return one_window(params, memory, window, passes, most_passes, config)

    if config.remat_windows:
      body = jax.checkpoint(body, prevent_cse=False)
    some = jax.tree.map(lambda x: x[first:last], many)
    return jax.lax.scan(body, memory, some)

  memory = init_memory(model, batch, config)
  still = jax.lax.stop_gradient
  constant = 0
  if config.gradient_windows:
    constant = max(0, before + 1 - config.gradient_windows)
  results = []
  if constant:
    memory, result = scan(*still((params, memory)), 0, constant)
    memory = still(memory)
    results.append(result)
  if constant < before:
    memory, result = scan(params, memory, constant, before)
    results.append(result)
  with jax.named_scope("wake"):
    last = (*(x[:, split:] for x in arrays), None)
    memory, (last_loss_sum, output, _, _) = one_window(
      params, memory, last, 1, 1, config
    )
  loss_sum, predictions, slept = last_loss_sum, [output], None
  pass_loss = None
  if results:
    loss_sums, outputs, slept, pass_losses = jax.tree.map(
      lambda *x: jnp.concatenate(x), *results
    )
    loss_sum += jnp.sum(loss_sums)
    outputs = jnp.moveaxis(outputs, 0, 1).reshape(batch, split)
    predictions.insert(0, outputs)
    pass_loss = None if pass_losses is None else jnp.sum(pass_losses, axis=0)
  return Rollout(
    loss_sum=loss_sum,
    predictions=jnp.concatenate(predictions, axis=1),
    memory=memory,
    slept=slept,
    pass_loss=pass_loss,
  )
