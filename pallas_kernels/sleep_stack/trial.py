"""Whether the kernel gives the scan's answers on this very device.

As `pallas_kernels.gated_delta.trial`, for the model and the window at hand.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from pallas_kernels.gated_delta import trial
from pallas_kernels.sleep_stack.pallas_tpu import Stack
from sleep_jax.config import ModelConfig, SleepConfig
from sleep_jax.model.fast_weights import init_fast_weights
from sleep_jax.model.hybrid_lm import HybridLM


@functools.cache
def verdict(kernel, trusted, config: ModelConfig, length: int) -> str | None:
  """Why not to use `kernel` on this device; None if it may be used.

  Compared are h and S after two passes, for a batch that does not fill its last
  tile, with padding and with a row that is awake, products in full precision.
  The answer is kept, and one for all processes. A refusal is logged once.

  Args:
    kernel: (model, passes, sleep config, interpret, params, h, state, valid,
      row passes) -> (h, state).
    trusted: the same without `interpret`.
    config: of the model.
    length: L.
  """
  reason = trial.everywhere(
    functools.partial(_compare, kernel, trusted, config, length)
  )
  if reason is not None:
    logging.warning(
      "sleep: not in one kernel on %s, one pass after the other instead: %s",
      jax.local_devices()[0].device_kind,
      reason,
    )
  return reason


def parameter_shapes(config: ModelConfig):
  """The parameters of a model's blocks, as shapes."""
  params = jax.eval_shape(
    HybridLM(config, 1).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 1), jnp.int32),
    init_fast_weights(config, 1),
    jax.ShapeDtypeStruct((1, 1), bool),
  )["params"]
  return {k: v for k, v in params.items() if k.startswith("group_")}


def inputs(config: ModelConfig, batch: int, length: int, passes: int):
  """(params, h, state, valid, row_passes) of blocks in the midst of their work.

  Places are padded at the start of some rows and at the end of others, and rows
  take 1 to `passes` passes.
  """
  rng = np.random.default_rng(0)

  def draw(path, x):
    normal = rng.normal(size=x.shape)
    if path[-1].key == "scale":
      normal = 1 + 0.1 * normal
    elif path[-1].key == "kernel":
      normal /= x.shape[-2] ** 0.5
    return jnp.asarray(normal, x.dtype)

  params = jax.tree_util.tree_map_with_path(draw, parameter_shapes(config))
  h = rng.normal(size=(batch, length, config.width))
  state = jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype),
    init_fast_weights(config, batch),
  )
  row, place = np.arange(batch)[:, None], np.arange(length)[None]
  padding = row % 4 * length // 5
  valid = np.where(row % 2 == 0, place >= padding, place < length - padding)
  return (
    params,
    jnp.asarray(h, config.compute_dtype),
    state,
    jnp.asarray(valid),
    jnp.asarray(passes - row[:, 0] % passes, jnp.int32),
  )


def difference(mine, theirs) -> float:
  """The largest of all leaves, relative to the largest of theirs or to 1."""
  pairs = zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True)
  return max(
    float(np.abs(x - y).max() / max(1.0, np.abs(y).max()))
    for x, y in ([np.asarray(z, np.float32) for z in pair] for pair in pairs)
  )


def _compare(kernel, trusted, config, length):
  """By distance from the scan in float32: two that round differ by more."""
  rows = Stack.of(config, 2**16, length, 2).rows
  params, h, *others = inputs(config, rows + 1, length, 2)
  exact = dataclasses.replace(config, compute_dtype="float32")

  def run(form, config, *options):
    model, sleep_config = HybridLM(config, 1), SleepConfig(passes=2)
    form = functools.partial(form, model, 2, sleep_config, *options)
    arrays = params, h.astype(config.compute_dtype), *others
    return jax.device_get(jax.jit(form)(*arrays))

  with jax.default_matmul_precision("highest"):
    try:
      mine = run(kernel, config, False)
    except Exception as error:  # whatever a compiler or driver may say
      return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    expected = run(trusted, exact)
    theirs = run(trusted, config)
  found = difference(mine, expected)
  allowed = trial.TOLERANCES[config.compute_dtype]
  allowed += 2 * difference(theirs, expected)
  # Not `>`: NaN fails too.
  if not found <= allowed:
    return f"h or S differs by {found:.1e} for L = {length}"
  return None
