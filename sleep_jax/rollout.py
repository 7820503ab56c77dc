"""The wake/sleep schedule over a long sequence (Algorithm 1, hard eviction)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sleep_jax.array_types import Mask, Tokens
from sleep_jax.model import layers
from sleep_jax.model.fast_weights import init_fast_weights
from sleep_jax.sleep import sleep


class Rollout(NamedTuple):
  """What a rollout gives: sums of the loss, and predictions where it counts.

  Attributes:
    loss_sum: cross-entropy (nats) summed over the masked places.
    predictions: argmax token at the masked places, 0 elsewhere [B, T].
    state: fast weights after the last window, which took one pass.
  """

  loss_sum: jax.Array
  predictions: jax.Array
  state: tuple


def rollout(
  model,
  params,
  inputs: Tokens,
  targets: Tokens,
  loss_mask: Mask,
  valid: Mask,
  *,
  window_length: int,
  passes: int,
) -> Rollout:
  """Runs a batch window by window and returns its `Rollout`.

  Rows are cut into windows of `window_length` tokens and what remains. In a
  window without loss a row sleeps `passes` times, in one with loss it is awake
  and takes one pass: each row by its own mask. Between windows h is dropped
  and S alone goes on, so S alone carries the gradient. The last window takes
  one pass for every row: nothing comes after it that could profit.

  The windows before the last are one `lax.scan`, the passes another, the
  repeats of the model's pattern a third: compile time does not grow with them.

  Args:
    model: a `HybridLM`.
    params: its parameters.
    inputs, targets: token ids [B, T]; the prediction part of a row has inputs
      [marker, y0, y1, ...] and targets [y0, y1, ...].
    loss_mask: where a target counts.
    valid: False where a place is padding.
    window_length: L.
    passes: N.
  """
  variables = {"params": params}

  def judge(h, targets, mask):
    logits = model.apply(variables, h, method="logits")
    log_probabilities = jax.nn.log_softmax(logits)
    nats = -jnp.take_along_axis(log_probabilities, targets[..., None], -1)
    predictions = jnp.argmax(logits, axis=-1).astype(targets.dtype)
    return jnp.sum(nats[..., 0] * mask), jnp.where(mask, predictions, 0)

  def one_window(state, window, passes):
    inputs, targets, mask, valid = window
    h = model.apply(variables, inputs, method="embed")
    sleeps = ~jnp.any(mask, axis=1)
    h, state = sleep(model, params, h, state, valid, sleeps, passes)
    # Most windows hold no loss at all; their logits are not computed.
    loss_sum, predictions = jax.lax.cond(
      jnp.any(mask),
      judge,
      lambda h, targets, mask: (
        jnp.zeros((), dtype),
        jnp.zeros_like(targets),
      ),
      h,
      targets,
      mask,
    )
    return state, (loss_sum, predictions)

  batch, length = inputs.shape
  state = init_fast_weights(model.config, batch)
  _, dtype = layers.dtypes(model.config)
  arrays = (inputs, targets, loss_mask, valid)
  before = (length - 1) // window_length
  split = before * window_length
  loss_sum, predictions = jnp.zeros((), dtype), []
  if before:

    def windows(x):
      x = x[:, :split].reshape(batch, before, window_length)
      return jnp.moveaxis(x, 1, 0)

    state, (loss_sums, outputs) = jax.lax.scan(
      lambda state, window: one_window(state, window, passes),
      state,
      tuple(map(windows, arrays)),
    )
    loss_sum = jnp.sum(loss_sums)
    predictions.append(jnp.moveaxis(outputs, 0, 1).reshape(batch, split))
  state, (last_loss_sum, output) = one_window(
    state, tuple(x[:, split:] for x in arrays), 1
  )
  return Rollout(
    loss_sum=loss_sum + last_loss_sum,
    predictions=jnp.concatenate([*predictions, output], axis=1),
    state=state,
  )
