"""Sleep: N passes of the blocks over a window that is about to be evicted."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from pallas_kernels.sleep_stack import pallas_tpu, trial
from sleep_jax.array_types import Hidden, Mask, Rows
from sleep_jax.model.hybrid_lm import HybridLM


def sleep(
  model: HybridLM,
  params,
  h: Hidden,
  state,
  valid: Mask,
  sleeps: Rows,
  passes: int,
):
  """(h, state) after `passes` passes, or after one where a row is awake.

  Paper, Algorithm 1: N times (h, S) <- Blocks(h, S). S is not reset between
  passes, and h is carried, so keys, values and gates are computed anew from
  features that have already read S.

  On a TPU all passes run in one kernel if it serves this model and window and
  has passed its trial there; else, and in the gradient, they are a `lax.scan`.
  A debug log says why.

  Args:
    model: a `HybridLM`.
    params: its parameters.
    h: embedded window [B, L, D].
    state: fast weights at the window's start.
    valid: False where a place is padding: its h, and S, stay as they are.
    sleeps: rows [B] that take all passes; the others take the first alone.
    passes: N >= 1.
  """
  params = {k: v for k, v in params.items() if k.startswith("group_")}
  arrays = params, h, state, valid, sleeps
  if reason := why_not_one_kernel(model, params, h):
    logging.debug("sleep: one pass after the other, because %s", reason)
    return scanned(model, passes, *arrays)
  return one_kernel(model, passes, False, *arrays)


def why_not_one_kernel(model: HybridLM, params, h: Hidden) -> str | None:
  """Why `sleep` scans over passes here; None if it runs them in one kernel."""
  if (platform := jax.default_backend()) != "tpu":
    return f"there is no kernel for {platform}"
  batch, length, _ = h.shape
  if reason := pallas_tpu.cannot_serve(model.config, params, batch, length):
    return reason
  if reason := trial.verdict(one_kernel, scanned, model.config, length):
    return f"the kernel failed its trial: {reason}"
  return None


def scanned(
  model: HybridLM,
  passes: int,
  params,
  h: Hidden,
  state,
  valid: Mask,
  sleeps: Rows,
):
  """`sleep` as a `lax.scan` over passes: everywhere, and differentiable."""

  def one_pass(carry, n):
    h, state = carry
    active = valid & (sleeps | (n == 0))[:, None]
    new_h, state = model.apply(
      {"params": params}, h, state, active, method="blocks"
    )
    return (jnp.where(active[..., None], new_h, h), state), None

  (h, state), _ = jax.lax.scan(one_pass, (h, state), jnp.arange(passes))
  return h, state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def one_kernel(
  model: HybridLM,
  passes: int,
  interpret: Any,
  params,
  h: Hidden,
  state,
  valid: Mask,
  sleeps: Rows,
):
  """`sleep` in one kernel, with the gradient of `scanned`, run again."""
  return pallas_tpu.sleep(
    model.config, params, h, state, valid, sleeps, passes, interpret
  )


def _one_kernel_forward(model, passes, interpret, *arrays):
  return one_kernel(model, passes, interpret, *arrays), arrays


def _one_kernel_backward(model, passes, interpret, arrays, cotangents):
  del interpret
  params, h, state, valid, sleeps = arrays
  _, vjp = jax.vjp(
    lambda params, h, state: scanned(
      model, passes, params, h, state, valid, sleeps
    ),
    params,
    h,
    state,
  )
  return *vjp(cotangents), None, None


one_kernel.defvjp(_one_kernel_forward, _one_kernel_backward)
