"""Sleep: N passes of the blocks over a window that is about to be evicted.

Paper, Algorithm 1: N times (h, S) <- Blocks(h, S). S is not reset between
passes, and h is carried, so keys, values and gates are computed anew from
features that have already read S. A pass attends to its own keys of the window,
and to what the cache has kept of the window before; the cache of the next
window is made by a row's last pass, or by its first (`sleep.kept_pass`).

Rows of a batch take numbers of passes of their own. Where a row takes none,
its h, S and cache stay as they are.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from pallas_kernels.sleep_stack import pallas_tpu, trial
from pallas_kernels.target import target
from sleep_jax.array_types import Counts, Hidden, Mask, Rows
from sleep_jax.config import SleepConfig
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.model.places import Places, init_cache, window


class Slept(NamedTuple):
  """What a sleep gives.

  Attributes:
    h, state, cache: after the last pass.
    passes: that each row took [B].
    norms: of S after each pass, |S_n| over all looped layers [N, B]; None where
      they were not asked for, 0 where a row took no such pass.
    changes: |S_n - S_(n-1)| / |S_n|, likewise.
    each: h after each pass [N, B, L, D], of `sleep` with `sleep.pass_loss`.
  """

  h: Hidden | None
  state: Any
  cache: Any
  passes: Counts
  norms: jax.Array | None = None
  changes: jax.Array | None = None
  each: jax.Array | None = None


def sleep(
  model,
  params,
  h: Hidden,
  state,
  cache,
  places: Places,
  row_passes: Counts,
  passes: int,
  config: SleepConfig,
  groups: slice = slice(None),
) -> Slept:
  """A sleep to be differentiated: a `lax.scan` over N passes.

  On a TPU all passes run in one kernel where it serves this model and window
  and has passed its trial there (the gradient runs the scan); a debug log says
  why not.

  A row that takes n of the N passes takes the last n, so that all rows end
  together. The passes before the last `sleep.gradient_passes` count as the
  identity on the way back: h is a residual stream and S decays slowly, so that
  embeddings and earlier windows still learn.

  Args:
    model: a `HybridLM`.
    params: its parameters.
    h: embedded window [B, L, D].
    state: fast weights of the looped groups at the window's start.
    cache: what these have kept from before the window.
    places: where the window's tokens stand.
    row_passes: passes of each row [B], 1..N.
    passes: N >= 1.
    config: which passes are differentiated and rematerialised, and which one
      makes the next cache.
    groups: of the model's pattern, that are looped; all of them.
  """
  reason = "h is wanted after each"
  if not config.pass_loss:
    reason = why_not_one_kernel(model, params, h, cache, groups)
  if reason:
    logging.debug("sleep: one pass after the other, because %s", reason)
    arrays = params, h, state, cache, places, row_passes
    return _scan(model, passes, config, groups, *arrays)
  return _in_one_kernel(
    model, passes, config, params, h, state, cache, places, row_passes
  )


def _in_one_kernel(
  model, passes, config, params, h, state, cache, places, row_passes
) -> Slept:
  params = {k: v for k, v in params.items() if k.startswith("group_")}
  h, state = one_kernel(
    *(model, passes, config, False),
    *(params, h, state, places.valid, row_passes),
  )
  return Slept(h, state, cache, row_passes)


def why_not_one_kernel(model, params, h: Hidden, cache, groups) -> str | None:
  """Why `sleep` scans over passes here; None if it runs them in one kernel."""
  platform, _, here = target()
  if platform != "tpu":
    return f"there is no kernel for {platform}"
  if jax.sharding.get_abstract_mesh().size > 1:
    return "rows are spread over devices"
  if jax.tree.leaves(cache):
    return "tokens are kept, or convolutions carried"
  count = len(model.config.pattern)
  if groups.indices(count) != (0, count, 1):
    return "not all groups are looped"
  if model.config.implementation not in ("", "pallas_tpu"):
    return f"model.implementation is {model.config.implementation}"
  batch, length, _ = h.shape
  if reason := pallas_tpu.cannot_serve(model.config, params, batch, length):
    return reason
  if not here:  # compiled for a device on which the trial is yet to come
    return None
  if reason := trial.verdict(one_kernel, scanned, model.config, length):
    return f"the kernel failed its trial: {reason}"
  return None


def _scan(
  model, passes, config, groups, params, h, state, cache, places, row_passes
) -> Slept:
  """`sleep` as a `lax.scan` over passes: everywhere, and differentiable."""
  blocks = _blocks(model, groups)

  def scan(params, cache, carry, first, last):
    def body(carry, n):
      active = passes - n <= row_passes
      keeps = _keeps(config, active, passes - n == row_passes)
      carry = _one_pass(blocks, params, carry, cache, places, active, keeps)
      return carry, carry[0] if config.pass_loss else None

    if config.remat_passes:
      body = jax.checkpoint(body, prevent_cse=False)
    return jax.lax.scan(body, carry, jnp.arange(first, last))

  early = passes - config.gradient_passes if config.gradient_passes else 0
  if early > 0:
    still = jax.lax.stop_gradient
    constants = still((params, cache, (h, state, cache)))
    (*learnt, made), _ = scan(*constants, 0, early)
    # The value of what was learnt, the gradient of what it started from.
    h, state = jax.tree.map(
      lambda x, y: still(y) + (x - still(x)), (h, state), tuple(learnt)
    )
  else:
    early, made = 0, cache
  carry, each = scan(params, cache, (h, state, made), early, passes)
  return Slept(*carry, row_passes, each=each)


def scanned(
  model: HybridLM,
  passes: int,
  config: SleepConfig,
  params,
  h: Hidden,
  state,
  valid: Mask,
  row_passes: Counts,
):
  """(h, state) after a scan over passes, where all leaves and all is looped."""
  cache = init_cache(model.config, h.shape[0], 0, history=False)
  places = window(valid, h.shape[1])
  arrays = params, h, state, cache, places, row_passes
  slept = _scan(model, passes, config, slice(None), *arrays)
  return slept.h, slept.state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def one_kernel(
  model: HybridLM,
  passes: int,
  config: SleepConfig,
  interpret: Any,
  params,
  h: Hidden,
  state,
  valid: Mask,
  row_passes: Counts,
):
  """`scanned` in one kernel, with the gradient of the scan, run again."""
  del config  # says what the gradient keeps
  return pallas_tpu.sleep(
    model.config, params, h, state, valid, row_passes, passes, interpret
  )


def _one_kernel_forward(model, passes, config, interpret, *arrays):
  return one_kernel(model, passes, config, interpret, *arrays), arrays


def _one_kernel_backward(model, passes, config, interpret, arrays, cotangents):
  del interpret
  *primals, valid, row_passes = arrays

  def scan(params, h, state):
    arrays = params, h, state, valid, row_passes
    return scanned(model, passes, config, *arrays)

  _, vjp = jax.vjp(scan, *primals)
  return *vjp(cotangents), None, None


one_kernel.defvjp(_one_kernel_forward, _one_kernel_backward)


def sleep_until(
  model,
  params,
  h: Hidden,
  state,
  cache,
  places: Places,
  row_passes: Counts,
  passes: int,
  config: SleepConfig,
  groups: slice = slice(None),
  tolerance=None,
  watch: bool = True,
) -> Slept:
  """A sleep that stops early: for evaluation and sessions, not for gradients.

  A row stops after its `row_passes`, at most N, or where
  |S_n - S_(n-1)| <= tolerance |S_n|; the loop ends with its last row.
  Arguments as those of `sleep`, and the tolerance, which may be traced (0 takes
  all passes; None is `sleep.tolerance`). `Slept.norms` and `changes` are given
  but where nobody watches: then a sleep without tolerance may, as in `sleep`,
  be one kernel.
  """
  batch = h.shape[0]
  blocks = _blocks(model, groups)
  tolerance = config.tolerance if tolerance is None else tolerance
  if not watch and isinstance(tolerance, float) and tolerance == 0:
    if not why_not_one_kernel(model, params, h, cache, groups):
      return _in_one_kernel(
        model, passes, config, params, h, state, cache, places, row_passes
      )

  def unfinished(loop):
    n, active, _ = loop
    return (n < passes) & jnp.any(active)

  def one_pass(loop):
    n, active, slept = loop
    before = slept.state
    h, state, cache_after = _one_pass(
      blocks,
      params,
      slept[:3],
      cache,
      places,
      active,
      _keeps(config, active, active & (n == 0)),
    )
    norm = row_norm(state, batch)
    change = row_norm(jax.tree.map(jnp.subtract, state, before), batch)
    change = change / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
    slept = Slept(
      h,
      state,
      cache_after,
      slept.passes + active,
      slept.norms.at[n].set(jnp.where(active, norm, 0)),
      slept.changes.at[n].set(jnp.where(active, change, 0)),
    )
    active = active & (n + 1 < row_passes)
    active = active & ((tolerance <= 0) | (change > tolerance))
    return n + 1, active, slept

  zeros = jnp.zeros((passes, batch), row_norm(state, batch).dtype)
  start = Slept(h, state, cache, jnp.zeros_like(row_passes), zeros, zeros)
  _, _, slept = jax.lax.while_loop(
    unfinished, one_pass, (jnp.zeros((), jnp.int32), row_passes > 0, start)
  )
  return slept


def _blocks(model, groups):
  def run(params, *arrays):
    return model.apply({"params": params}, *arrays, groups, method="blocks")

  return run


@jax.named_scope("pass")
def _one_pass(blocks, params, carry, cache, places, active: Rows, keeps: Rows):
  """(h, state, next cache) after one pass of the active rows."""
  h, state, kept = carry
  places = places.replace(valid=places.valid & active[:, None])
  new_h, state, new = blocks(params, h, state, cache, places)
  h = jnp.where(places.valid[..., None], new_h, h)

  def choose(new, kept):  # [R, B, ...]
    rows = keeps.reshape(1, -1, *[1] * (new.ndim - 2))
    return jnp.where(rows, new, kept)

  return h, state, jax.tree.map(choose, new, kept)


def _keeps(config: SleepConfig, active: Rows, first: Rows) -> Rows:
  """Rows whose keys of this pass, so far, are those to be kept."""
  return first if config.kept_pass == "first" else active


def row_norm(state, batch):
  """Frobenius norm of each row's S over all given layers [B]."""
  squares = [
    jnp.sum(jnp.square(x), axis=(0, *range(2, x.ndim)))
    for x in jax.tree.leaves(state)
  ]
  return jnp.sqrt(sum(squares, jnp.zeros(batch)))
